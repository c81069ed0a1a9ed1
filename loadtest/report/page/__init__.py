"""What the page of HTML is made of: escaped markup, axes, plots, tables."""

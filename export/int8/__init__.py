"""What static int8 rests on: which nodes, which ranges, which layers suffer."""

"""grpcio as the protocol's transport: the server, its endpoint, who may use it."""

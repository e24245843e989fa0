"""The Open Inference Protocol V2 over gRPC, with ECHOSIGHT_GRPC_PORT. An extra: imported where it is asked for."""

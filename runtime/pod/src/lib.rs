//! The pod: engine behind gRPC and HTTP, health, metrics, drain.

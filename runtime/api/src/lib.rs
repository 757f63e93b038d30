//! The Inference trait and the thin HTTP and gRPC codecs over it.

//! The engine: scheduler, paged KV, sampling; owns the device thread.

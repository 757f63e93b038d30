//! Custom resource types of serving.trustformers.dev.

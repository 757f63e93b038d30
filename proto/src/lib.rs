//! Wire types: the gRPC services, generated from `proto/`, the configuration file of a pod, the [`Task`]
//! words that all of them share, and the buckets of users and latencies in reports.

pub mod ab_test;
pub mod bounded_codec;
pub mod buckets;
pub mod latency;
mod outcome;
pub mod pod_config;
mod task;
pub mod yaml;

#[cfg(test)]
mod wire;

pub use task::{Task, UnknownTask};

/// Package `trustformers.v1`: what callers of a model see.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    unreachable_pub,
    unused_qualifications,
    reason = "generated code"
)]
pub mod v1 {
    tonic::include_proto!("trustformers.v1");
}

/// Package `trustformers.control.v1`: the operator's route feed.
pub mod control {
    /// Version 1 of the feed.
    #[allow(
        missing_docs,
        clippy::all,
        clippy::pedantic,
        unreachable_pub,
        unused_qualifications,
        reason = "generated code"
    )]
    pub mod v1 {
        tonic::include_proto!("trustformers.control.v1");
    }
}

/// Package `inference`: the Open Inference Protocol of KServe and Triton.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    unreachable_pub,
    unused_qualifications,
    reason = "generated code"
)]
pub mod inference {
    tonic::include_proto!("inference");
}

/// The encoded `FileDescriptorSet` of all packages, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

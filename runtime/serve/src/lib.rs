//! All in one process: engines, HTTP and gRPC on a laptop or an edge box, with no cluster.
//!
//! The library is the program without its flags: [`Config`] is `config.yaml`, [`TrustformersServer`] serves
//! it, and [`proto`] is the gRPC client.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use trustformers_serve::proto::{inference_service_client::InferenceServiceClient, GenerateRequest};
//!
//! let mut client = InferenceServiceClient::connect("http://[::1]:9090").await?;
//! let request = GenerateRequest {
//!     prompt: "The capital of France is".to_string(),
//!     max_tokens: 100,
//!     temperature: 0.7,
//!     top_p: 0.9,
//!     ..Default::default()
//! };
//! let response = client.generate(request).await?;
//! println!("{}", response.into_inner().text);
//! # Ok(())
//! # }
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`], `config_file.rs` | `config.yaml` and its values |
//! | `speculation_config.rs`, `adapter_config.rs` | the sections of a model in it |
//! | `inference_model.rs`, `documents.rs` | the YAML of an `InferenceModel`, and files of several documents |
//! | [`config_source`], `model_folder.rs` | where a configuration comes from: a file, or a folder of models |
//! | `reload.rs` | a configuration that changes while the server runs |
//! | `tracing_config.rs` | where the spans of requests go |
//! | [`ab_test`] | users divided between models, and what that shows |
//! | [`remote`], `front.rs` | models that other servers have, and the gateway to them |
//! | [`server`] | the server as a library |

pub mod ab_test;
mod adapter_config;
pub mod config;
mod config_file;
pub mod config_source;
mod documents;
mod front;
mod inference_model;
mod model_folder;
mod reload;
pub mod remote;
pub mod server;
mod speculation_config;
mod tracing_config;

pub use ab_test::{ABTestConfig, ABTestReport, RoutingKey, Variant};
pub use config::{BatchingConfig, BatchingStrategy, Config, ConfigError, ModelConfig};
pub use config_source::ConfigSource;
pub use remote::{EndpointConfig, HighAvailabilityConfig, LoadBalancerConfig, LoadBalancingAlgorithm};
pub use server::{Running, ServerError, TrustformersResult, TrustformersServer};
pub use tracing_config::{TracingConfig, TracingExporter};
pub use trustformers_proto::v1 as proto;

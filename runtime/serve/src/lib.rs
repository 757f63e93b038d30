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

pub mod config;
mod config_file;
pub mod server;

pub use config::{Config, ConfigError};
pub use server::{Running, ServerError, TrustformersServer};
pub use trustformers_proto::v1 as proto;

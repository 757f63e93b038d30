//! The server as a library: the same as the program, started and ended by the caller.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use prometheus::Registry;
use trustformers_runtime::device::{self, DeviceChoice};
use trustformers_runtime::models::ModelServer;
use trustformers_runtime::process::{Drain, Process, Settings, StartError, run};
use trustformers_telemetry::metrics::{self, MetricsError};

use crate::config::{Config, ConfigError, ModelConfig};

/// How long answers in flight may take once the server is asked to end.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a server could not start serving.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The configuration cannot be honoured.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A listener, a metric or a setting stands in the way.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The metrics do not fit together.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// A path of a model that is not text.
    #[error("the path {path:?} of model {name} is not UTF-8; rename it")]
    PathNotUtf8 {
        /// The model.
        name: String,
        /// What was given.
        path: std::path::PathBuf,
    },
}

/// A server that is being put together.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use trustformers_serve::{Config, TrustformersServer};
///
/// let config: Config = "models: [{name: smollm2, path: /models/smollm2.gguf}]".parse()?;
/// let mut server = TrustformersServer::new(config);
/// server.load_model("other", "/models/other.gguf")?;
/// let running = server.start().await?;
/// running.until_ready().await;
/// println!("curl http://{}/v1/models", running.http_address());
/// running.drain().await;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct TrustformersServer {
    config: Config,
    threads: Option<usize>,
}

/// A server that listens; its models load in the background.
pub struct Running {
    process: Process,
}

impl TrustformersServer {
    /// A server of the configured models.
    pub fn new(config: Config) -> Self {
        Self { config, threads: None }
    }

    /// Sets the threads of the CPU device; by default as many as the process may use.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Adds a model: a `.gguf` file, or a folder that holds one. It is loaded when the server starts.
    ///
    /// # Errors
    /// A path that is not text. Whether a model lies there is known when it is loaded; its state then says
    /// so.
    pub fn load_model(&mut self, name: impl Into<String>, path: impl AsRef<Path>) -> Result<(), ServerError> {
        let (name, path) = (name.into(), path.as_ref());
        let Some(text) = path.to_str() else {
            return Err(ServerError::PathNotUtf8 { name, path: path.to_owned() });
        };
        let path = text.to_owned();
        self.config.models.push(ModelConfig {
            name,
            path,
            device: DeviceChoice::Auto,
            max_batch_size: None,
            speculation: None,
        });
        Ok(())
    }

    /// Listens and begins to load.
    ///
    /// # Errors
    /// [`ServerError`], before anything was loaded. A model that cannot be loaded is no error here: it is
    /// FAILED with its cause, and the others serve.
    pub async fn start(self) -> Result<Running, ServerError> {
        let (settings, registry) = self.settings()?;
        let process = Process::start(settings, registry, device::real()).await?;
        Ok(Running { process })
    }

    /// Listens, loads and serves until SIGTERM or SIGINT, then drains.
    ///
    /// # Errors
    /// As for [`TrustformersServer::start`].
    pub async fn run(self) -> Result<(), ServerError> {
        let (settings, registry) = self.settings()?;
        Ok(run(settings, registry, device::real()).await?)
    }

    fn settings(&self) -> Result<(Settings, Registry), ServerError> {
        let settings = Settings {
            models: self.config.specs(self.threads)?,
            listen: self.config.listen(),
            // No router sends requests to a single process, so there is no routing table to wait for.
            drain: Drain { quiet: Duration::ZERO, timeout: DRAIN_TIMEOUT },
        };
        Ok((settings, metrics::new_registry("trustformers-serve", env!("CARGO_PKG_VERSION"))?))
    }
}

impl Running {
    /// Where HTTP is served.
    pub fn http_address(&self) -> SocketAddr {
        self.process.http_address()
    }

    /// Where gRPC is served.
    pub fn grpc_address(&self) -> SocketAddr {
        self.process.grpc_address()
    }

    /// The models and their states.
    pub fn models(&self) -> &Arc<ModelServer> {
        self.process.models()
    }

    /// Waits until every model has been loaded or has failed.
    pub async fn until_ready(&self) {
        use trustformers_api::Health;
        let mut readiness = self.models().readiness();
        while !self.models().startup().ok {
            // The channel cannot close while the models live, and this borrows them.
            if readiness.changed().await.is_err() {
                return;
            }
        }
    }

    /// Ends: answers in flight are given, at most for [`DRAIN_TIMEOUT`]. Returns whether all could be.
    pub async fn drain(self) -> bool {
        self.process.drain().await
    }
}

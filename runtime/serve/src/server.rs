//! The server as a library: the same as the program, started and ended by the caller.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use prometheus::Registry;
use tokio::task::JoinHandle;
use trustformers_gateway::EmbeddedSettings;
use trustformers_proto::v1::ModelStatus;
use trustformers_runtime::device;
use trustformers_runtime::faults::Faults;
use trustformers_runtime::metrics_compat::MetricsCompat;
use trustformers_runtime::model_table::ControlError;
use trustformers_runtime::models::ModelServer;
use trustformers_runtime::process::{Drain, EndSignals, Listen, Process, Settings, Sight, StartError};
use trustformers_runtime::slots::SwapTarget;
use trustformers_telemetry::metrics::{self, MetricsError};

use crate::ab_test::{ABTest, ABTestConfig, ABTestReport};
use crate::config::{BatchingConfig, Config, ConfigError, ModelConfig, wrong};
use crate::config_source::ConfigSource;
use crate::front::{Front, LocalProcess};
use crate::reload::{Followed, Reloader};
use crate::remote::{HighAvailabilityConfig, LoadBalancerConfig, RemoteConfig};
use crate::tracing_config::TracingConfig;

/// What the functions of this library return.
pub type TrustformersResult<T> = Result<T, ServerError>;

/// Why a server could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The configuration cannot be honoured.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A listener, a metric or a setting stands in the way.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The gateway in front of models with endpoints can't start.
    #[error(transparent)]
    Front(#[from] trustformers_gateway::server::StartError),
    /// The metrics do not fit together.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// A model could not be loaded or unloaded.
    #[error(transparent)]
    Control(#[from] ControlError),
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
/// Models may be added before the server starts, and loaded and unloaded while it runs:
///
/// ```no_run
/// use trustformers_serve::{BatchingConfig, BatchingStrategy, Config};
/// use trustformers_serve::{TrustformersResult, TrustformersServer};
///
/// # async fn example() -> TrustformersResult<()> {
/// let config: Config = "models: [{name: smollm2, path: /models/smollm2.gguf}]".parse()?;
/// let mut server = TrustformersServer::new(config).with_batching(BatchingConfig {
///     max_batch_size: 32,
///     max_wait_time_ms: 10,
///     strategy: BatchingStrategy::Dynamic,
///     enable_priority: true,
/// })?;
/// server.load_model("minilm", "/models/all-MiniLM-L6-v2")?;
///
/// let running = server.start().await?;
/// running.until_ready().await;
/// println!("curl http://{}/v1/models", running.http_address());
///
/// let model = running.load_model("smollm2-v2", "/models/smollm2-v2.gguf").await?;
/// println!("{} has the digest {}", model.name, model.digest);
/// running.swap_model("smollm2", "smollm2-v2")?;
/// running.rollback_model("smollm2")?;
/// running.unload_model("smollm2").await?;
/// running.drain().await;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct TrustformersServer {
    config: Config,
    threads: Option<usize>,
    metrics_compat: Option<MetricsCompat>,
    followed: Option<Followed>,
    tests: Vec<ABTest>,
}

/// A server that listens; its models load in the background.
pub struct Running {
    process: Process,
    batching: BatchingConfig,
    threads: Option<usize>,
    /// What callers reach, where other servers have models.
    front: Option<Front>,
    tests: Vec<ABTest>,
    _following: Option<Following>,
}

/// The task that follows a configuration. It ends with this.
struct Following(JoinHandle<()>);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A path as text.
fn utf8(name: &str, path: &Path) -> TrustformersResult<String> {
    let not_utf8 = || ServerError::PathNotUtf8 { name: name.to_owned(), path: path.to_owned() };
    path.to_str().map(str::to_owned).ok_or_else(not_utf8)
}

impl TrustformersServer {
    /// A server of the configured models.
    pub fn new(config: Config) -> Self {
        Self { config, threads: None, metrics_compat: None, followed: None, tests: Vec::new() }
    }

    /// A server of a file or a folder, which is read again while the server runs: models that are added,
    /// changed or removed there are loaded and unloaded.
    ///
    /// # Errors
    /// What cannot be read or honoured.
    pub fn open(source: ConfigSource) -> TrustformersResult<Self> {
        let reading = source.read()?;
        let config = source.config_of(&reading)?;
        let followed = Some(Followed { source, reading });
        Ok(Self { config, threads: None, metrics_compat: None, followed, tests: Vec::new() })
    }

    /// What is served and where.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Sets the threads of the CPU device; by default as many as the process may use.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Sets how requests share an engine, for the models that do not say themselves.
    ///
    /// # Errors
    /// A figure that is out of its range.
    pub fn with_batching(mut self, batching: BatchingConfig) -> TrustformersResult<Self> {
        batching.check("batching")?;
        self.config.batching = batching;
        Ok(self)
    }

    /// Exports a span of each request, and of its phases in the engine.
    ///
    /// # Errors
    /// An endpoint or a rate that cannot be used.
    pub fn enable_tracing(&mut self, tracing: TracingConfig) -> TrustformersResult<()> {
        self.config.tracing = Some(tracing.options()?);
        Ok(())
    }

    /// Sets how the endpoints of models ([`ModelConfig::endpoints`]) are chosen and checked. A server whose
    /// models have none does not start with it.
    ///
    /// # Errors
    /// A figure that is out of its range.
    pub fn enable_load_balancing(&mut self, balancing: LoadBalancerConfig) -> TrustformersResult<()> {
        balancing.check()?;
        self.config.load_balancing = Some(balancing);
        Ok(())
    }

    /// Sets what happens when endpoints of models fail. A server whose models have none does not start with
    /// it.
    ///
    /// # Errors
    /// A figure that is out of its range.
    pub fn enable_high_availability(
        &mut self,
        availability: HighAvailabilityConfig,
    ) -> TrustformersResult<()> {
        availability.check()?;
        self.config.high_availability = Some(availability);
        Ok(())
    }

    /// Divides the users of a name between models of this server, which may include the one that has the
    /// name. [`Running::ab_test_report`] says what that shows. The server then has a gateway in front, as
    /// with [`ModelConfig::endpoints`], and its callers cannot load and unload models.
    ///
    /// ```no_run
    /// use trustformers_serve::{ABTestConfig, Config, RoutingKey, Variant};
    /// use trustformers_serve::{TrustformersResult, TrustformersServer};
    ///
    /// # async fn example() -> TrustformersResult<()> {
    /// let config: Config = "models: [{name: gpt2, path: /models/gpt2.gguf}]".parse()?;
    /// let mut server = TrustformersServer::new(config);
    /// server.load_model("gpt2-v2", "/models/gpt2-v2.gguf")?;
    /// server.enable_ab_test("gpt2", ABTestConfig {
    ///     variants: vec![
    ///         Variant { model: "gpt2".to_owned(), weight: 0.9 },
    ///         Variant { model: "gpt2-v2".to_owned(), weight: 0.1 },
    ///     ],
    ///     routing_key: RoutingKey::UserId,
    /// })?;
    /// let running = server.start().await?;
    /// println!("{:?}", running.ab_test_report("gpt2"));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Variants that are no models of this server, weights that do not sum to 1, or a name that has a test.
    pub fn enable_ab_test(&mut self, model: &str, test: ABTestConfig) -> TrustformersResult<()> {
        let known: Vec<&str> = self.config.models.iter().map(|model| model.name.as_str()).collect();
        let test = ABTest::new(model, test, &known)?;
        if self.tests.iter().any(|other| other.name() == model) {
            return Err(wrong("ab_test", format!("{model} has a test already")).into());
        }
        self.tests.push(test);
        Ok(())
    }

    /// Adds the figures of `/metrics` under the names of another server.
    #[must_use]
    pub fn with_metrics_compat(mut self, compat: MetricsCompat) -> Self {
        self.metrics_compat = Some(compat);
        self
    }

    /// Adds a model: a `.gguf` file, or a folder that holds one or a checkpoint. It is loaded when the server
    /// starts.
    ///
    /// # Errors
    /// A path that is not text, or a name that is taken. Whether a model lies there is known when it is
    /// loaded; its state then says so.
    pub fn load_model(&mut self, name: impl Into<String>, path: impl AsRef<Path>) -> TrustformersResult<()> {
        let name = name.into();
        let path = utf8(&name, path.as_ref())?;
        if self.config.models.iter().any(|model| model.names().any(|taken| *taken == name)) {
            return Err(ControlError::NameTaken { name }.into());
        }
        self.config.models.push(ModelConfig::new(name, path));
        Ok(())
    }

    /// Takes a model out again, which then is not loaded.
    ///
    /// # Errors
    /// No model has this name.
    pub fn unload_model(&mut self, name: &str) -> TrustformersResult<()> {
        let models = &mut self.config.models;
        let index = models.iter().position(|model| model.names().any(|known| known == name));
        let index = index.ok_or_else(|| ControlError::Unknown { name: name.to_owned() })?;
        models.remove(index);
        Ok(())
    }

    /// Listens and begins to load.
    ///
    /// # Errors
    /// [`ServerError`], before anything was loaded. A model that cannot be loaded is no error here: it is
    /// FAILED with its cause, and the others serve.
    pub async fn start(self) -> TrustformersResult<Running> {
        let (settings, registry) = self.settings()?;
        let Self { config, threads, followed, tests, .. } = self;
        let process = Process::start(settings, registry.clone(), device::real()).await?;
        let front = if has_front(&config, &tests) {
            let (settings, local) = (front_settings(&config, registry), LocalProcess::of(&process));
            Some(Front::start(settings, RemoteConfig::of(&config), local, tests.clone()).await?)
        } else {
            None
        };
        let following = followed.map(|followed| {
            let reloader = Reloader::new(followed, &config, threads, Arc::clone(process.models()));
            let reloader = reloader.with_remote(front.as_ref().map(Front::remote));
            Following(tokio::spawn(reloader.run()))
        });
        Ok(Running { process, batching: config.batching, threads, front, tests, _following: following })
    }

    /// Listens, loads and serves until SIGTERM or SIGINT, then drains. A second signal ends at once.
    ///
    /// # Errors
    /// As for [`TrustformersServer::start`].
    pub async fn run(self) -> TrustformersResult<()> {
        let signals = EndSignals::new()?;
        let running = self.start().await?;
        signals.drain_on_the_first(running.drain()).await;
        Ok(())
    }

    fn settings(&self) -> TrustformersResult<(Settings, Registry)> {
        if self.config.models.is_empty() {
            return Err(wrong("models", "is empty: give at least one model").into());
        }
        self.config.check_remote()?;
        let settings = Settings {
            models: self.config.specs(self.threads)?,
            listen: process_listen(&self.config, has_front(&self.config, &self.tests)),
            // No router sends requests to a single process, so there is no routing table to wait for.
            drain: Drain { quiet: Duration::ZERO, timeout: self.config.drain_timeout() },
            model_control: self.config.model_control(self.threads),
            admin: self.config.admin(self.threads),
            sight: Sight {
                traces: self.config.tracing.clone(),
                metrics_compat: self.metrics_compat,
                ..Sight::default()
            },
            faults: Faults::default(),
        };
        Ok((settings, metrics::new_registry("trustformers-serve", env!("CARGO_PKG_VERSION"))?))
    }
}

/// Whether callers reach a gateway: other servers have models, or users are divided.
fn has_front(config: &Config, tests: &[ABTest]) -> bool {
    !tests.is_empty() || config.models.iter().any(ModelConfig::is_remote)
}

/// Where the process of the loaded models listens: where callers reach it, or behind the gateway.
fn process_listen(config: &Config, has_front: bool) -> Listen {
    let listen = config.listen();
    if !has_front {
        return listen;
    }
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    // Both ports of the gateway have the metrics already.
    let metrics = listen.metrics.filter(|address| *address != listen.http && *address != listen.grpc);
    Listen { http: loopback, grpc: loopback, metrics, allowed_origins: listen.allowed_origins }
}

/// What the gateway in front needs.
fn front_settings(config: &Config, registry: Registry) -> EmbeddedSettings {
    let listen = config.listen();
    EmbeddedSettings {
        http_address: listen.http,
        grpc_address: listen.grpc,
        drain_timeout: config.drain_timeout(),
        traces: config.tracing.clone(),
        registry,
    }
}

impl Running {
    /// Where HTTP is served.
    pub fn http_address(&self) -> SocketAddr {
        self.front.as_ref().map_or_else(|| self.process.http_address(), Front::http_address)
    }

    /// Where gRPC is served.
    pub fn grpc_address(&self) -> SocketAddr {
        self.front.as_ref().map_or_else(|| self.process.grpc_address(), Front::grpc_address)
    }

    /// The models that are loaded here, and their states.
    pub fn models(&self) -> &Arc<ModelServer> {
        self.process.models()
    }

    /// Loads a model and waits until it is ready. The load goes on when the future is dropped.
    ///
    /// # Errors
    /// A path that is not text, a name that is taken, or why it could not be loaded; nothing of it is left
    /// then.
    pub async fn load_model(
        &self,
        name: impl Into<String>,
        path: impl AsRef<Path>,
    ) -> TrustformersResult<ModelStatus> {
        let name = name.into();
        let path = utf8(&name, path.as_ref())?;
        let model = ModelConfig::new(name, path);
        let spec = model.spec(&model.name, &self.batching, self.threads)?;
        Ok(self.models().load(spec).await?)
    }

    /// Unloads a model and waits until its answers in flight have ended and its memory is free. Returns what
    /// it was.
    ///
    /// # Errors
    /// No model has this name.
    pub async fn unload_model(&self, name: &str) -> TrustformersResult<ModelStatus> {
        Ok(self.models().unload(name).await?)
    }

    /// Lets the model that was loaded as `version` answer for `model`. What is being answered is answered to
    /// its end by the weights that began it. From now on `version` names a version of `model`; the one that
    /// answered before stays loaded for [`Running::rollback_model`], until another load needs its slot or its
    /// memory. Asking for the version that answers already changes nothing.
    ///
    /// # Errors
    /// No such model or version, one that is not ready or does something else, or a model whose second slot
    /// holds a version that was not swapped in yet.
    pub fn swap_model(&self, model: &str, version: &str) -> TrustformersResult<ModelStatus> {
        Ok(self.models().swap(model, &SwapTarget::OtherModel(version.to_owned()), None)?)
    }

    /// Lets the version before the last swap answer for a model again.
    ///
    /// # Errors
    /// No such model, or no version before.
    pub fn rollback_model(&self, model: &str) -> TrustformersResult<ModelStatus> {
        Ok(self.models().rollback(model, None)?)
    }

    /// What the test of a name shows so far; none where it has no test.
    pub fn ab_test_report(&self, model: &str) -> Option<ABTestReport> {
        let test = self.tests.iter().find(|test| test.name() == model)?;
        Some(test.report(&self.front.as_ref()?.test_counts(test)))
    }

    /// Waits until every model that the server started with has been loaded or has failed.
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

    /// Ends: answers in flight are given, at most for the configured time. Returns whether all could be.
    pub async fn drain(self) -> bool {
        let Self { process, front, _following: following, .. } = self;
        drop(following);
        let all_forwarded = match front {
            Some(front) => front.drain().await,
            None => true,
        };
        process.drain().await && all_forwarded
    }
}

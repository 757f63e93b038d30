//! `trustformers-runtime`: the program of a model's pod.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use trustformers_api::browser::AllowedOrigins;
use trustformers_proto::pod_config::{PodAdmin, PodConfig};
use trustformers_runtime::admin::{AdminSettings, TokenRules};
use trustformers_runtime::control::{LoadDefaults, ModelControl};
use trustformers_runtime::device;
use trustformers_runtime::faults::Faults;
use trustformers_runtime::liveness::ENGINE_STALL;
use trustformers_runtime::metrics_compat::MetricsCompat;
use trustformers_runtime::process::{Drain, Listen, Settings, Sight, run};
use trustformers_runtime::spec::ModelSpec;
use trustformers_telemetry::logs::{self, LogFormat, LogOptions};
use trustformers_telemetry::metrics;
use trustformers_telemetry::traces::TraceFlags;

/// After SIGTERM, new requests are served until none has come for this long: endpoint lists of routers and
/// kube-proxy lag by a second or so.
const QUIET: Duration = Duration::from_secs(2);

/// Loads one model and serves it over HTTP and gRPC.
///
/// The file given by --config says what to load; in a cluster the operator writes it. The status is served
/// from the first moment, while the model loads: GET /v1/models, GET /health/ready, gRPC
/// ModelService/WatchModels. A model that cannot be loaded does not end the process: it stays up and says
/// why.
///
/// HTTP: the routes that GET /openapi.json describes (/v1/generate, OpenAI's and Anthropic's below /v1,
/// KServe v2 below /v2), GET /metrics. gRPC: trustformers.v1, inference (KServe v2), grpc.health.v1,
/// reflection.
///
/// SIGTERM drains: readiness falls at once, requests are answered to their end (at most drainTimeoutMs of the
/// configuration), then the process ends. A second signal ends at once.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 110)]
struct Flags {
    /// What to load: a YAML file with model.names, model.revision, model.path and, where wanted, model.files,
    /// model.sha256, model.task, engine.{device, numerics, kvCache, contextTokens, maxBatchSize, maxQueue,
    /// batchStrategy, maxWaitMs, priority}, drainTimeoutMs and, for the admin port, admin.{port, keysFile,
    /// audience, subject, issuer}.
    #[arg(long, value_name = "FILE", default_value = "/etc/trustformers/pod.yaml")]
    config: PathBuf,
    /// Address of HTTP; [::] listens on every address, IPv4 too.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:8080")]
    http_address: SocketAddr,
    /// Address of gRPC.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:9090")]
    grpc_address: SocketAddr,
    /// Address of the admin port: gRPC ModelService and POST /v1/models/{load, swap, rollback, unload}, for
    /// whoever sends a token that the next three flags describe. Without it the section admin of --config
    /// says where it is, if there is one.
    #[arg(long, value_name = "ADDRESS", requires_all = ["admin_keys", "admin_audience", "admin_subject"])]
    admin_address: Option<SocketAddr>,
    /// The public keys that tokens are signed with: a file with what the API server answers at
    /// /openid/v1/jwks.
    #[arg(long, value_name = "FILE", requires = "admin_address")]
    admin_keys: Option<PathBuf>,
    /// The audience that a token must be made for.
    #[arg(long, value_name = "AUDIENCE", requires = "admin_address")]
    admin_audience: Option<String>,
    /// The account that a token must be of, such as system:serviceaccount:trustformers:operator.
    #[arg(long, value_name = "SUBJECT", requires = "admin_address")]
    admin_subject: Option<String>,
    /// The issuer that a token must have; by default any, as the keys are the cluster's own.
    #[arg(long, value_name = "URL", requires = "admin_address")]
    admin_issuer: Option<String>,
    /// An origin whose pages may call this server from a browser, such as https://app.example.com; may be
    /// given several times. Without it pages of every origin may.
    #[arg(long, value_name = "ORIGIN")]
    allow_origin: Vec<String>,
    /// Threads of the CPU device; by default as many as the process may use (its CPU limit counts).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Adds the figures of GET /metrics under the names of another server: vllm, as the Gateway API inference
    /// extension and many dashboards read them.
    #[arg(long, value_name = "SERVER", env = "TRUSTFORMERS_METRICS_COMPAT")]
    metrics_compat: Option<MetricsCompat>,
    /// Liveness fails when the engine has had work and made no step for so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = ENGINE_STALL.as_secs(),
        value_parser = clap::value_parser!(u64).range(1..=86_400))]
    engine_stall: u64,
    /// For tests alone: each request waits for so many milliseconds before it is admitted.
    #[arg(long, hide = true, value_name = "MS", env = "TRUSTFORMERS_FAULT_DELAY_MS", default_value_t = 0,
        value_parser = clap::value_parser!(u64).range(0..=60_000))]
    fault_delay: u64,
    #[command(flatten)]
    traces: TraceFlags,
    /// Log lines as text or json, on stderr.
    #[arg(long, value_name = "FORMAT", env = "TRUSTFORMERS_LOG_FORMAT", default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or directives such as info,trustformers_engine=debug.
    #[arg(long, value_name = "FILTER", env = "RUST_LOG", default_value = "info")]
    log: String,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    match serve(flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("trustformers-runtime: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(flags: Flags) -> anyhow::Result<()> {
    let asked = admin_settings(&flags);
    let Flags {
        config,
        http_address,
        grpc_address,
        allow_origin,
        threads,
        metrics_compat,
        engine_stall,
        fault_delay,
        traces,
        log_format,
        log,
        ..
    } = flags;
    logs::init(&LogOptions { format: log_format, filter: log })?;
    let text = std::fs::read_to_string(&config)
        .with_context(|| format!("{} cannot be read; name the file with --config", config.display()))?;
    let parsed = PodConfig::parse(&text).with_context(|| format!("{} is not valid", config.display()))?;
    let spec = ModelSpec::from_pod(&parsed, threads.map(usize::from))
        .with_context(|| format!("{} cannot be honoured", config.display()))?;
    let threads = threads.map(usize::from);
    let of_config = || parsed.admin.as_ref().map(|admin| pod_admin(admin, config.clone(), threads));
    let mut admin = asked.or_else(of_config);
    if let Some(admin) = &mut admin {
        // Whoever has the token may name what the pod's own cache and Secret are for.
        admin.defaults.fetch.clone_from(&spec.fetch);
    }
    let allowed_origins = AllowedOrigins::listed(&allow_origin).context("--allow-origin")?;
    let settings = Settings {
        models: vec![spec],
        listen: Listen { http: http_address, grpc: grpc_address, metrics: None, allowed_origins },
        drain: Drain { quiet: QUIET, timeout: Duration::from_millis(parsed.drain_timeout_ms) },
        model_control: ModelControl::Operator,
        sight: Sight {
            traces: traces.options("trustformers-runtime")?,
            metrics_compat,
            engine_stall: Duration::from_secs(engine_stall),
        },
        faults: Faults { delay: Duration::from_millis(fault_delay) },
        admin,
    };
    let registry = metrics::new_registry("trustformers-runtime", env!("CARGO_PKG_VERSION"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(run(settings, registry, device::real()));
    // A load under way on a blocking thread must not hold up the end.
    runtime.shutdown_background();
    Ok(outcome?)
}

/// The admin port, where the flags ask for one: each of them needs the others.
fn admin_settings(flags: &Flags) -> Option<AdminSettings> {
    let tokens = TokenRules {
        keys_file: flags.admin_keys.clone()?,
        audience: flags.admin_audience.clone()?,
        subject: flags.admin_subject.clone()?,
        issuer: flags.admin_issuer.clone(),
    };
    let defaults = LoadDefaults { threads: flags.threads.map(usize::from), ..LoadDefaults::default() };
    Some(AdminSettings { address: flags.admin_address?, tokens, pod_config: None, defaults })
}

/// The admin port that the operator's configuration asks for.
fn pod_admin(admin: &PodAdmin, config: PathBuf, threads: Option<usize>) -> AdminSettings {
    AdminSettings {
        address: SocketAddr::from((Ipv6Addr::UNSPECIFIED, admin.port)),
        tokens: TokenRules::of_pod(admin),
        pod_config: Some(config),
        defaults: LoadDefaults { threads, ..LoadDefaults::default() },
    }
}

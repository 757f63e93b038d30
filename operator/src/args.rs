//! The command line. Every flag can be given by an environment variable as well, as the chart does.

use std::net::SocketAddr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use trustformers_telemetry::logs::{LogFormat, LogOptions};

/// Control plane of trustformers-serve: runs the pods of InferenceModels and publishes routes to the
/// gateways.
#[derive(Debug, Parser)]
#[command(name = "trustformers-operator", version, about)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the control plane in the cluster of the pod's ServiceAccount, or of $KUBECONFIG outside a pod.
    Run(Box<RunArgs>),
    /// Print the CustomResourceDefinitions of this version as YAML.
    Crd,
}

/// Flags of `run`.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Namespace of the operator itself, with its Lease and its pods. Models may be in any namespace.
    #[arg(long, env = "POD_NAMESPACE", default_value = "trustformers-system")]
    pub namespace: String,

    /// Name of the operator's own pod, which gets a label while it leads. Default: no pod is labelled.
    #[arg(long, env = "POD_NAME")]
    pub pod_name: Option<String>,

    /// Address for /metrics, /health/live and /health/ready.
    #[arg(long, env = "TRUSTFORMERS_HTTP_ADDRESS", default_value = "0.0.0.0:8080")]
    pub http_address: SocketAddr,

    /// Address for the route feed (gRPC) of the gateways.
    #[arg(long, env = "TRUSTFORMERS_FEED_ADDRESS", default_value = "0.0.0.0:9091")]
    pub feed_address: SocketAddr,

    /// How gateways authenticate.
    #[arg(long, env = "TRUSTFORMERS_FEED_AUTH", value_enum, default_value_t = FeedAuth::Token)]
    pub feed_auth: FeedAuth,

    /// ServiceAccount of the gateways, in the operator's namespace. With --feed-auth=token, only it may watch
    /// routes.
    #[arg(long, env = "TRUSTFORMERS_GATEWAY_SERVICE_ACCOUNT", default_value = "trustformers-gateway")]
    pub gateway_service_account: String,

    /// URL of the gateway for callers; shown in the status of each model.
    #[arg(
        long,
        env = "TRUSTFORMERS_GATEWAY_URL",
        default_value = "http://trustformers-gateway.trustformers-system.svc:8080"
    )]
    pub gateway_url: String,

    /// Service of the gateways, in the operator's namespace: HTTPRoutes of models lead there.
    #[arg(long, env = "TRUSTFORMERS_GATEWAY_SERVICE", default_value = "trustformers-gateway")]
    pub gateway_service: String,

    /// Port of that Service for HTTP.
    #[arg(long, env = "TRUSTFORMERS_GATEWAY_HTTP_PORT", default_value_t = 8080)]
    pub gateway_http_port: u16,

    /// Port of that Service for gRPC.
    #[arg(long, env = "TRUSTFORMERS_GATEWAY_GRPC_PORT", default_value_t = 9090)]
    pub gateway_grpc_port: u16,

    /// Image of the pods of models without spec.runtime.image.
    #[arg(
        long,
        env = "TRUSTFORMERS_RUNTIME_IMAGE",
        default_value = concat!("localhost/trustformers-runtime:v", env!("CARGO_PKG_VERSION"))
    )]
    pub runtime_image: String,

    /// When kubelet pulls images of pods and of models.
    #[arg(long, env = "TRUSTFORMERS_IMAGE_PULL_POLICY", value_enum, default_value_t = PullPolicy::IfNotPresent)]
    pub image_pull_policy: PullPolicy,

    /// How pods recognise the operator when it changes their models.
    #[arg(long, env = "TRUSTFORMERS_POD_AUTH", value_enum, default_value_t = PodAuth::Token)]
    pub pod_auth: PodAuth,

    /// ServiceAccount of the operator, in its namespace: pods accept its tokens alone. It must be allowed to
    /// create serviceaccounts/token of itself.
    #[arg(long, env = "TRUSTFORMERS_SERVICE_ACCOUNT", default_value = "trustformers-operator")]
    pub service_account: String,

    /// Reconciles that may run at the same time.
    #[arg(long, env = "TRUSTFORMERS_CONCURRENCY", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub concurrency: u16,

    /// Log settings.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Flags of the log.
#[derive(Debug, Clone, Args)]
pub struct LogArgs {
    /// Format of log lines: `text` or `json`.
    #[arg(long, env = "TRUSTFORMERS_LOG_FORMAT", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// Log level (error, warn, info, debug, trace) or directives such as info,trustformers_operator=debug.
    #[arg(long, env = "TRUSTFORMERS_LOG", default_value = "info")]
    pub log: String,
}

impl LogArgs {
    /// The options for the log.
    #[must_use]
    pub fn options(&self) -> LogOptions {
        LogOptions { format: self.log_format, filter: self.log.clone() }
    }
}

/// How gateways authenticate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FeedAuth {
    /// By a ServiceAccount token for the audience `trustformers-feed`, checked with a TokenReview.
    Token,
    /// Gateways do not authenticate: for tests and single machines.
    None,
}

/// How pods recognise the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PodAuth {
    /// By a token of its ServiceAccount for the audience `trustformers-pods.NAMESPACE`, NAMESPACE being that
    /// of the pods.
    Token,
    /// They do not: new revisions are loaded by new pods only.
    None,
}

/// When kubelet pulls an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum PullPolicy {
    /// If the node does not have the image.
    IfNotPresent,
    /// Before each start.
    Always,
    /// Never: the node must have the image.
    Never,
}

impl PullPolicy {
    /// The word in a pod spec.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::IfNotPresent => "IfNotPresent",
            Self::Always => "Always",
            Self::Never => "Never",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_needs_no_flag() {
        let cli = Cli::parse_from(["trustformers-operator", "run"]);
        let Command::Run(args) = cli.command else { panic!("not run") };
        assert_eq!(args.feed_auth, FeedAuth::Token);
        assert_eq!(args.image_pull_policy.as_str(), "IfNotPresent");
        assert_eq!(args.feed_address.port(), 9091);
    }
}

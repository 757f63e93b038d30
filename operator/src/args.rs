//! The command line. Every flag can be given by an environment variable as well, as the chart does.

use std::net::SocketAddr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use trustformers_telemetry::logs::{LogFormat, LogOptions};

/// Control plane of trustformers-serve: makes InferenceModels true and tells gateways where their pods are.
#[derive(Debug, Parser)]
#[command(name = "trustformers-operator", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the control plane against the cluster of the pod's ServiceAccount, or else of $KUBECONFIG.
    Run(Box<RunArgs>),
    /// Print the CustomResourceDefinition that this version works with, as YAML.
    Crd,
}

/// Flags of `run`.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Namespace of the operator itself: its Lease and its pods are there. Models are served in every namespace.
    #[arg(long, env = "POD_NAMESPACE", default_value = "trustformers-system")]
    pub namespace: String,

    /// Name of the operator's own pod, which is labelled while it leads. Left out: nothing is labelled.
    #[arg(long, env = "POD_NAME")]
    pub pod_name: Option<String>,

    /// Where to serve /metrics, /health/live and /health/ready.
    #[arg(long, env = "TRUSTFORMERS_HTTP_ADDRESS", default_value = "0.0.0.0:8080")]
    pub http_address: SocketAddr,

    /// Where to serve the route feed (gRPC) to gateways.
    #[arg(long, env = "TRUSTFORMERS_FEED_ADDRESS", default_value = "0.0.0.0:9091")]
    pub feed_address: SocketAddr,

    /// How gateways prove who they are.
    #[arg(long, env = "TRUSTFORMERS_FEED_AUTH", value_enum, default_value_t = FeedAuth::Token)]
    pub feed_auth: FeedAuth,

    /// ServiceAccount of the gateways, in the operator's namespace; with --feed-auth=token no other may watch routes.
    #[arg(long, env = "TRUSTFORMERS_GATEWAY_SERVICE_ACCOUNT", default_value = "trustformers-gateway")]
    pub gateway_service_account: String,

    /// Where callers reach the gateway; shown in each model's status.
    #[arg(
        long,
        env = "TRUSTFORMERS_GATEWAY_URL",
        default_value = "http://trustformers-gateway.trustformers-system.svc:8080"
    )]
    pub gateway_url: String,

    /// Image of the pods of models that name none.
    #[arg(
        long,
        env = "TRUSTFORMERS_RUNTIME_IMAGE",
        default_value = concat!("localhost/trustformers-runtime:v", env!("CARGO_PKG_VERSION"))
    )]
    pub runtime_image: String,

    /// When kubelet pulls the pods' images and the models' images.
    #[arg(long, env = "TRUSTFORMERS_IMAGE_PULL_POLICY", value_enum, default_value_t = PullPolicy::IfNotPresent)]
    pub image_pull_policy: PullPolicy,

    /// Reconciles that may run at once.
    #[arg(long, env = "TRUSTFORMERS_CONCURRENCY", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub concurrency: u16,

    /// What is logged.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Flags of the log.
#[derive(Debug, Clone, Args)]
pub struct LogArgs {
    /// Log lines as `text` or `json`.
    #[arg(long, env = "TRUSTFORMERS_LOG_FORMAT", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// A level (error, warn, info, debug, trace) or directives such as info,trustformers_operator=debug.
    #[arg(long, env = "TRUSTFORMERS_LOG", default_value = "info")]
    pub log: String,
}

impl LogArgs {
    /// The options as the log takes them.
    #[must_use]
    pub fn options(&self) -> LogOptions {
        LogOptions { format: self.log_format, filter: self.log.clone() }
    }
}

/// How gateways prove who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FeedAuth {
    /// By a ServiceAccount token for the audience `trustformers-feed`, checked with a TokenReview.
    Token,
    /// Not at all: for tests and single machines.
    None,
}

/// When kubelet pulls an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum PullPolicy {
    /// When the node has none.
    IfNotPresent,
    /// Before each start.
    Always,
    /// Never: the node must have it.
    Never,
}

impl PullPolicy {
    /// The word as pods take it.
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

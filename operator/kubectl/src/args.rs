//! The command line: which cluster and namespace, which command, and how its result is printed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// State, rollouts, logs, checks and A/B tests of the models of trustformers-serve.
#[derive(Debug, Parser)]
#[command(name = "kubectl-trustformers", bin_name = "kubectl trustformers", version, about)]
pub struct Cli {
    /// Which cluster and namespace.
    #[command(flatten)]
    pub target: Target,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// Which cluster and namespace, as kubectl has it.
#[derive(Debug, Clone, Default, Args)]
pub struct Target {
    /// The kubeconfig. Default: $KUBECONFIG or ~/.kube/config, or in a pod its ServiceAccount.
    #[arg(long, global = true, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// A context of the kubeconfig. Default: its current one.
    #[arg(long, global = true)]
    pub context: Option<String>,
    /// The namespace. Default: that of the context.
    #[arg(long, short, global = true)]
    pub namespace: Option<String>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The state of models; of one model with its conditions, its load, its rollout and its pods.
    Status(StatusArgs),
    /// The rollout of a model: its state, commands to it, its history.
    #[command(subcommand)]
    Rollout(RolloutCommand),
    /// The logs of a model's pods.
    Logs(LogsArgs),
    /// Checks the installation and the models, and says what to do. It ends with 1 if a check fails.
    Doctor(DoctorArgs),
    /// What an A/B test shows, with its intervals.
    Report(ReportArgs),
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// The format of a command's result.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct FormatArgs {
    /// The format of the output.
    #[arg(long, short, value_enum, default_value_t = Format::Text)]
    pub output: Format,
}

/// `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// A model. Default: a table of all.
    pub name: Option<String>,
    /// The models of every namespace.
    #[arg(long, short = 'A', conflicts_with_all = ["name", "namespace"])]
    pub all_namespaces: bool,
    /// Print the state again whenever it changes, until interrupted.
    #[arg(long, short, conflicts_with = "output")]
    pub watch: bool,
    /// The format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// `rollout`.
#[derive(Debug, Subcommand)]
pub enum RolloutCommand {
    /// Where the rollout is.
    Status(RolloutStatusArgs),
    /// Skip the steps, holds and limits that remain; during the bake, end it; after a rollback, try the
    /// revision again.
    Promote(ModelArgs),
    /// Give all requests to the stable revision again.
    Abort(ModelArgs),
    /// During the bake: return to the previous revision.
    Undo(ModelArgs),
    /// The last decisions, the newest first.
    History(HistoryArgs),
}

/// A model.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// The model.
    pub name: String,
}

/// `rollout status`.
#[derive(Debug, Args)]
pub struct RolloutStatusArgs {
    /// The model.
    pub name: String,
    /// Print each change until the rollout ends. It ends with 1 if the revision is rolled back or waits for a
    /// person.
    #[arg(long, short, conflicts_with = "output")]
    pub watch: bool,
    /// The format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// `rollout history`.
#[derive(Debug, Args)]
pub struct HistoryArgs {
    /// The model.
    pub name: String,
    /// The format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// `logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// The model.
    pub name: String,
    /// Go on with what is written later, also by pods that start later, until interrupted.
    #[arg(long, short)]
    pub follow: bool,
    /// Only pods that were made for this revision.
    #[arg(long)]
    pub revision: Option<String>,
    /// Lines of each pod, from its end.
    #[arg(long, value_name = "LINES", value_parser = clap::value_parser!(i64).range(0..))]
    pub tail: Option<i64>,
    /// The container before the last restart.
    #[arg(long, short, conflicts_with = "follow")]
    pub previous: bool,
}

/// `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The namespace of the operator and the gateways.
    #[arg(long, default_value = "trustformers-system", value_name = "NAMESPACE")]
    pub system_namespace: String,
    /// The format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// `report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The ABTest.
    pub name: String,
    /// Write a page with charts into this file. It needs no network.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// The format.
    #[command(flatten)]
    pub format: FormatArgs,
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
    fn the_namespace_may_stand_behind_the_command() {
        let cli = Cli::parse_from(["kubectl-trustformers", "rollout", "promote", "chat", "-n", "team"]);
        assert_eq!(cli.target.namespace.as_deref(), Some("team"));
        let Command::Rollout(RolloutCommand::Promote(ModelArgs { name })) = cli.command else {
            panic!("not promote")
        };
        assert_eq!(name, "chat");
    }

    #[test]
    fn a_watch_has_no_other_format_and_a_name_no_other_namespaces() {
        for wrong in [&["status", "--watch", "-o", "json"][..], &["status", "chat", "-A"], &["logs"]] {
            let line = [&["kubectl-trustformers"], wrong].concat();
            assert!(Cli::try_parse_from(line).is_err(), "{wrong:?}");
        }
    }
}

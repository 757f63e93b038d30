//! The program as kubectl starts it: its name, its help, and what it says without a cluster.

use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-trustformers"));
    command.args(arguments).env_remove("KUBECONFIG").env("HOME", "/nonexistent");
    command.env_remove("KUBERNETES_SERVICE_HOST").output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn the_help_names_the_commands_as_kubectl_has_them() {
    let output = run(&["--help"]);
    let help = text(&output.stdout);
    assert!(output.status.success() && help.contains("Usage: kubectl trustformers"), "{help}");
    for command in ["status", "rollout", "logs", "doctor", "report"] {
        assert!(help.contains(command), "{command}");
    }
}

#[test]
fn without_a_cluster_it_says_how_to_name_one() {
    let output = run(&["status"]);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        error.starts_with("error: no cluster is configured") && error.contains("--kubeconfig"),
        "{error}"
    );
}

#[test]
fn a_kubeconfig_that_is_not_there_is_named() {
    let output = run(&["status", "--kubeconfig", "/nonexistent/kubeconfig"]);
    let error = text(&output.stderr);
    assert!(error.starts_with("error: the kubeconfig cannot be used"), "{error}");
}

#[test]
fn a_wrong_command_line_ends_with_2() {
    assert_eq!(run(&["rollout", "promote"]).status.code(), Some(2));
}

//! Runs a program to its end within a time limit. The error of a failed program holds all of its output.

use std::{ffi::OsStr, path::Path, process::Stdio, time::Duration};

use anyhow::{Context, Result, bail};
use tokio::{io::AsyncWriteExt, process::Command};

/// One invocation of a program.
#[derive(Debug)]
pub struct Invocation {
    command: Command,
    shown: String,
    input: Option<Vec<u8>>,
    limit: Duration,
}

/// The output of a program and how it ended.
#[derive(Debug)]
pub struct Output {
    /// True where the exit status was zero.
    pub success: bool,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Invocation {
    /// Will run `program` with `arguments`, for at most a minute.
    #[must_use]
    pub fn new<A: AsRef<OsStr>>(program: &Path, arguments: impl IntoIterator<Item = A>) -> Self {
        let mut command = Command::new(program);
        let mut shown = program.display().to_string();
        for argument in arguments {
            shown.push(' ');
            shown.push_str(&argument.as_ref().to_string_lossy());
            command.arg(argument);
        }
        // A scenario that is cancelled must not leave its programs behind.
        command.kill_on_drop(true);
        Self { command, shown, input: None, limit: Duration::from_secs(60) }
    }

    /// Sets an environment variable of the program.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Gives the program this standard input.
    #[must_use]
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = Some(input.into());
        self
    }

    /// Ends the program when it takes longer than `limit`.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs the program, whatever its exit status.
    ///
    /// # Errors
    /// When it could not be started, or did not end within the limit.
    pub async fn output(mut self) -> Result<Output> {
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        self.command.stdin(if self.input.is_some() { Stdio::piped() } else { Stdio::null() });
        let mut child = self.command.spawn().with_context(|| format!("could not start `{}`", self.shown))?;
        if let (Some(input), Some(mut stdin)) = (self.input, child.stdin.take()) {
            stdin.write_all(&input).await.with_context(|| format!("could not write to `{}`", self.shown))?;
        }
        let output = tokio::time::timeout(self.limit, child.wait_with_output())
            .await
            .with_context(|| format!("`{}` did not end within {:?}", self.shown, self.limit))??;
        Ok(Output {
            success: output.status.success(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs the program and returns its standard output.
    ///
    /// # Errors
    /// As [`Self::output`], and with all of the program's output when its exit status is not zero.
    pub async fn stdout(self) -> Result<String> {
        let shown = self.shown.clone();
        let output = self.output().await?;
        if !output.success {
            bail!("`{shown}` failed:\n{}{}", output.stdout, output.stderr);
        }
        Ok(output.stdout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn input_goes_in_and_output_comes_back() {
        let output = Invocation::new(Path::new("cat"), ["-"]).input("hello").stdout().await.unwrap();
        assert_eq!(output, "hello");
    }

    #[tokio::test]
    async fn an_error_holds_the_command_and_its_output() {
        let script = ["-c", "echo out; echo err >&2; exit 3"];
        let error = Invocation::new(Path::new("sh"), script).stdout().await.unwrap_err().to_string();
        assert!(error.contains("exit 3") && error.contains("out") && error.contains("err"), "{error}");
    }

    #[tokio::test]
    async fn a_program_that_does_not_end_is_given_up() {
        let endless =
            Invocation::new(Path::new("tail"), ["-f", "/dev/null"]).limit(Duration::from_millis(20));
        let error = endless.output().await.unwrap_err().to_string();
        assert!(error.contains("did not end within"), "{error}");
    }
}

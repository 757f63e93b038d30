//! Open streams whose callers are another process: each process has its own limit of file descriptors, and
//! this one needs its own for the pod.

use std::io::Read as _;
use std::net::SocketAddr;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::load::{self, LoadError};

/// Tells this program to hold streams: the address and their number.
const VARIABLE: &str = "BENCH_HELD_STREAMS";
/// What it prints once all are open; anything else says why they are not.
const OPEN: &str = "open";

/// Streams that stay open until [`HeldStreams::end`], or until this is dropped.
pub(crate) struct HeldStreams {
    process: Child,
    input: ChildStdin,
    _printed: Lines<BufReader<ChildStdout>>,
}

impl HeldStreams {
    /// Returns when every stream has brought its first token.
    ///
    /// # Errors
    /// One does not begin, or the process can't be started.
    pub(crate) async fn open(address: SocketAddr, count: usize) -> Result<Self, LoadError> {
        let failed = |error: std::io::Error| LoadError(format!("the process with the streams: {error}"));
        let own = std::env::current_exe().map_err(failed)?;
        let mut command = Command::new(own);
        command.env(VARIABLE, format!("{address} {count}")).kill_on_drop(true);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
        let pipes = process.stdin.take().zip(process.stdout.take());
        let (input, output) = pipes.ok_or_else(|| LoadError("a process without pipes".to_owned()))?;
        let mut printed = BufReader::new(output).lines();
        match printed.next_line().await.map_err(failed)? {
            Some(line) if line == OPEN => Ok(Self { process, input, _printed: printed }),
            Some(line) => Err(LoadError(line)),
            None => Err(LoadError("the process with the streams has ended".to_owned())),
        }
    }

    /// Closes them.
    pub(crate) async fn end(self) {
        let Self { mut process, input, .. } = self;
        drop(input);
        let _status = process.wait().await;
    }
}

/// Holds streams, where the environment says so, until whoever started this process ends them. False where it
/// does not.
pub(crate) fn hold_as_told() -> bool {
    let Ok(task) = std::env::var(VARIABLE) else { return false };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let streams = runtime.block_on(opened(&task));
    match &streams {
        Ok(_streams) => println!("{OPEN}"),
        Err(error) => println!("{error}"),
    }
    let _until_closed = std::io::stdin().read_to_end(&mut Vec::new());
    true
}

async fn opened(task: &str) -> Result<Vec<TcpStream>, LoadError> {
    let parsed = task.split_once(' ').and_then(|(address, count)| {
        Some((address.parse::<SocketAddr>().ok()?, count.parse::<usize>().ok()?))
    });
    let (address, count) = parsed.ok_or_else(|| LoadError(format!("{VARIABLE} is {task}")))?;
    load::open_streams(address, count).await
}

//! A WebSocket between a caller and a pod: bytes pass both ways, and the pod's messages are counted.

use std::time::Duration;

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::answer_end::{AnswerEnd, EndOutcome};
use crate::record::AnswerGuard;
use crate::session::SessionAttempts;
use crate::websocket_frames::{ServerFrames, close_frame};

/// After the caller has ended its side, the pod has this long to end its own.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes that pass at a time, in each direction.
pub(crate) const PASS_BYTES: usize = 8 << 10;

/// The WebSocket to a pod.
pub(crate) struct PodSocket {
    /// The connection.
    pub(crate) socket: Upgraded,
    /// Lasts as long as the connection.
    pub(crate) guard: AnswerGuard,
    /// The requests that the caller makes over it.
    pub(crate) attempts: SessionAttempts,
}

/// How a direction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passed {
    /// The sender ended it, or broke off.
    Ended,
    /// The receiver takes no more.
    Refused,
}

/// Passes bytes from one side to the other until either ends.
async fn pass<R, W>(from: &mut R, to: &mut W, mut seen: impl FnMut(&[u8])) -> Passed
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; PASS_BYTES];
    loop {
        let Ok(length @ 1..) = from.read(&mut buffer).await else { return Passed::Ended };
        seen(&buffer[..length]);
        if to.write_all(&buffer[..length]).await.is_err() || to.flush().await.is_err() {
            return Passed::Refused;
        }
    }
}

/// Passes bytes both ways until the WebSocket ends, and counts how.
pub(crate) async fn pass_both_ways<S>(caller: S, pod: PodSocket, first: Vec<u8>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let PodSocket { socket, mut guard, mut attempts } = pod;
    let (mut from_caller, mut to_caller) = tokio::io::split(caller);
    let (mut from_pod, mut to_pod) = tokio::io::split(TokioIo::new(socket));
    let mut frames = ServerFrames::default();
    let mut has_data = false;
    let passed = {
        let upwards = async {
            if to_pod.write_all(&first).await.is_ok() {
                pass(&mut from_caller, &mut to_pod, |_| {}).await;
            }
            let _closed = to_pod.shutdown().await;
        };
        let downwards = pass(&mut from_pod, &mut to_caller, |bytes| {
            if !std::mem::replace(&mut has_data, true) {
                guard.first_data();
            }
            frames.push(bytes, |message| attempts.json_message(message));
        });
        tokio::pin!(upwards, downwards);
        tokio::select! {
            passed = &mut downwards => Some(passed),
            () = &mut upwards => timeout(CLOSE_TIMEOUT, downwards).await.ok(),
        }
    };
    if frames.is_closed() {
        guard.ended(&AnswerEnd { outcome: EndOutcome::Complete, usage: None });
    } else if passed == Some(Passed::Ended) {
        if frames.is_between_frames() {
            let _told = to_caller.write_all(&close_frame(1012, "the pod broke off; connect again")).await;
        }
        attempts.reset();
        guard.ended(&AnswerEnd { outcome: EndOutcome::Reset, usage: None });
    }
    // Otherwise the caller has left, which dropping the guard counts.
    let _closed = to_caller.shutdown().await;
}

//! `trustformers-serve chat`: a conversation with a model on the terminal.
//!
//! stdout carries the answers alone, as they are made, so that they can be piped; the prompt mark, reasoning,
//! errors and figures go to stderr. `input.rs` reads what the user types, `transcript.rs` holds what was
//! said.

mod input;
mod transcript;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use trustformers_api::chat_answer::{self, ChatEventKind, ChatFinish, ChatUsage};
use trustformers_api::fields::HTTP_DEFAULTS;
use trustformers_api::{Api, ApiError, Asked, Health, Inference};
use trustformers_runtime::device;
use trustformers_runtime::load::Loader;
use trustformers_runtime::models::ModelServer;
use trustformers_runtime::process::{EndSignals, StartError};
use trustformers_runtime::spec::{ModelSpec, SpecError};

use crate::flags::ChatFlags;
use crate::loading::{self, ModelFlagError};
use crate::one_shot::{self, INTERRUPTED, OneShotError, OutputError};
use input::{ChatCommand, ChatInput, HELP, InputLines};
use transcript::{Transcript, TranscriptError};

/// The name of SIGINT, which ends an answer and not the conversation.
const INTERRUPT: &str = "SIGINT";

/// Lines that are read ahead of the answers.
const LINES_AHEAD: usize = 64;

/// Why the conversation could not be held.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChatFailure {
    /// The flags about the model are wrong.
    #[error(transparent)]
    Model(#[from] ModelFlagError),
    /// The model's settings are wrong.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The model could not be loaded.
    #[error("{0}")]
    Load(String),
    /// The model, or a message, was refused.
    #[error(transparent)]
    Refused(#[from] ApiError),
    /// The answer has no end.
    #[error("the answer broke off")]
    Broken,
    /// The process could not be set up.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The command could not begin.
    #[error(transparent)]
    OneShot(#[from] OneShotError),
    /// An answer could not be written.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// What the user types could not be read.
    #[error("stdin cannot be read: {0}")]
    Input(io::Error),
}

impl ChatFailure {
    /// 2 for what the caller typed, 1 for the rest.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Model(_) | Self::Spec(_) | Self::Refused(_) => 2,
            _ => 1,
        }
    }
}

/// How an answer ended.
#[derive(Debug)]
enum AnswerEnd {
    /// All of it is there.
    Complete(ChatFinish, ChatUsage),
    /// The user interrupted it.
    Stopped,
    /// The process is asked to end.
    Terminated,
}

/// A model that is loaded, and the conversation with it.
struct ChatSession {
    api: Api,
    models: Arc<ModelServer>,
    flags: ChatFlags,
    transcript: Transcript,
    /// Whether a person types; otherwise the first refusal ends the run.
    interactive: bool,
    signals: EndSignals,
}

/// Runs the subcommand.
pub(crate) fn run(flags: ChatFlags) -> Result<ExitCode, ChatFailure> {
    let spec = spec_of(&flags)?;
    let work = |signals| async { ChatSession::open(spec, flags, signals).await?.converse().await };
    one_shot::run_with_signals(work, |failure| match failure {
        ChatFailure::Output(error) => Some(error),
        _ => None,
    })
}

fn spec_of(flags: &ChatFlags) -> Result<ModelSpec, ChatFailure> {
    let mut spec = loading::spec_of(&flags.model, &flags.device)?;
    // A conversation has one answer at a time.
    spec.engine.max_batch_size = 1;
    spec.engine.max_queue = 1;
    Ok(spec)
}

impl ChatSession {
    async fn open(spec: ModelSpec, flags: ChatFlags, signals: EndSignals) -> Result<Self, ChatFailure> {
        let interactive = io::stdin().is_terminal();
        if interactive {
            eprintln!("loading {} ...", spec.name());
        }
        let models = Arc::new(ModelServer::new(vec![spec])?);
        let loader = Loader::new(device::real(), &prometheus::Registry::new()).map_err(StartError::from)?;
        let mut readiness = models.readiness();
        models.start_loading(&Arc::new(loader));
        while !models.startup().ok {
            // The channel cannot close while the models live.
            if readiness.changed().await.is_err() {
                break;
            }
        }
        let state = readiness.borrow().clone();
        if !state.ok {
            return Err(ChatFailure::Load(state.message));
        }
        let transcript = Transcript::new(flags.system.clone());
        let api = Api::new(Arc::clone(&models) as Arc<dyn Inference>, CancellationToken::new());
        let session = Self { api, models, flags, transcript, interactive, signals };
        // A model that does not generate, or has no chat template, is named before the first message.
        session.api.inference.count_tokens(session.transcript.probe()).await?;
        Ok(session)
    }

    async fn converse(mut self) -> Result<ExitCode, ChatFailure> {
        let (send, mut lines) = mpsc::channel(LINES_AHEAD);
        // Reading blocks, and nothing ends it: the thread lives until the process ends.
        let read = move || {
            for line in io::stdin().lines() {
                if send.blocking_send(line).is_err() {
                    return;
                }
            }
        };
        let _detached =
            std::thread::Builder::new().name("stdin".to_owned()).spawn(read).map_err(ChatFailure::Input)?;
        if self.interactive {
            eprintln!("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the conversation.");
        }
        let mut input = InputLines::default();
        let code = loop {
            self.mark(&input);
            let line = tokio::select! {
                line = lines.recv() => line,
                _ = self.signals.received() => break ExitCode::from(INTERRUPTED),
            };
            let Some(line) = line else { break ExitCode::SUCCESS };
            let Some(typed) = input.push(&line.map_err(ChatFailure::Input)?) else { continue };
            if let Some(code) = self.react(typed).await? {
                break code;
            }
        };
        self.models.stop().await;
        Ok(code)
    }

    /// The mark at which the user types.
    fn mark(&self, input: &InputLines) {
        if self.interactive {
            eprint!("{}", if input.is_open() { ". " } else { "> " });
        }
    }

    /// Does what was typed; gives the exit status where that ends the conversation.
    async fn react(&mut self, typed: ChatInput) -> Result<Option<ExitCode>, ChatFailure> {
        match typed {
            ChatInput::Nothing => Ok(None),
            ChatInput::Message(text) => {
                self.transcript.ask(&text);
                self.answered().await
            }
            ChatInput::Unknown(why) => {
                eprintln!("{why}");
                Ok(None)
            }
            ChatInput::Command(command) => self.command(command).await,
        }
    }

    async fn command(&mut self, command: ChatCommand) -> Result<Option<ExitCode>, ChatFailure> {
        match command {
            ChatCommand::Help => eprintln!("{HELP}"),
            ChatCommand::Exit => return Ok(Some(ExitCode::SUCCESS)),
            ChatCommand::Clear => self.transcript.clear(),
            ChatCommand::System(text) => self.transcript.set_system(text),
            ChatCommand::Retry => {
                if self.transcript.drop_answer() {
                    return self.answered().await;
                }
                eprintln!("there is no message to answer again");
            }
            ChatCommand::Undo => {
                if !self.transcript.drop_turn() {
                    eprintln!("there is no message to take back");
                }
            }
            ChatCommand::Tokens => match self.api.inference.count_tokens(self.transcript.counted()).await {
                Ok(tokens) => eprintln!("{tokens} tokens"),
                Err(error) => eprintln!("{error}"),
            },
            ChatCommand::Save(path) => match self.transcript.save(&path) {
                Ok(()) => eprintln!("saved to {}", path.display()),
                Err(error) => eprintln!("{error}"),
            },
            ChatCommand::Load(path) => match Transcript::load(&path) {
                Ok(transcript) => self.transcript = transcript,
                Err(error @ TranscriptError { .. }) => eprintln!("{error}"),
            },
        }
        Ok(None)
    }

    /// Answers the last message. What is refused is taken out of the conversation again.
    async fn answered(&mut self) -> Result<Option<ExitCode>, ChatFailure> {
        let began = Instant::now();
        match self.answer().await {
            Ok(AnswerEnd::Complete(reason, usage)) => {
                self.figures(reason, usage, began.elapsed());
                Ok(None)
            }
            Ok(AnswerEnd::Stopped) => {
                eprintln!("(stopped)");
                Ok((!self.interactive).then(|| ExitCode::from(INTERRUPTED)))
            }
            Ok(AnswerEnd::Terminated) => Ok(Some(ExitCode::from(INTERRUPTED))),
            Err(ChatFailure::Refused(error)) if self.interactive => {
                self.transcript.drop_turn();
                eprintln!("{error}\n(the message was taken back; /clear begins a new conversation)");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn answer(&mut self) -> Result<AnswerEnd, ChatFailure> {
        let ChatFlags { max_tokens, temperature, top_p, seed, .. } = &self.flags;
        let asked = Asked {
            prompt: self.transcript.conversation().into(),
            max_tokens: Some(*max_tokens),
            temperature: Some(*temperature),
            top_p: Some(*top_p),
            seed: *seed,
            ..Asked::default()
        };
        let request = asked.check(&HTTP_DEFAULTS)?;
        let (mut text, mut shown) = (String::new(), ShownReasoning::default());
        let mut admitted = Box::pin(chat_answer::ask(&self.api, [request]));
        let mut answer = tokio::select! {
            answer = &mut admitted => answer?,
            signal = self.signals.received() => return Ok(Self::interrupted(signal)),
        };
        drop(admitted);
        let end = loop {
            let event = tokio::select! {
                event = answer.events.next() => event,
                signal = self.signals.received() => break Self::interrupted(signal),
            };
            match event.transpose()?.map(|event| event.kind) {
                Some(ChatEventKind::Content(piece)) => {
                    shown.end();
                    one_shot::print(&piece)?;
                    text.push_str(&piece);
                }
                Some(ChatEventKind::Reasoning(piece)) => shown.add(&piece),
                Some(ChatEventKind::Finished { reason, usage, .. }) => {
                    break AnswerEnd::Complete(reason, usage);
                }
                Some(_) => {}
                None => return Err(ChatFailure::Broken),
            }
        };
        shown.end();
        if !text.ends_with('\n') {
            one_shot::print("\n")?;
        }
        self.transcript.answer(&text);
        Ok(end)
    }

    fn interrupted(signal: &'static str) -> AnswerEnd {
        if signal == INTERRUPT { AnswerEnd::Stopped } else { AnswerEnd::Terminated }
    }

    fn figures(&self, reason: ChatFinish, usage: ChatUsage, took: Duration) {
        if reason == ChatFinish::Length {
            eprintln!("(cut: --max-tokens or the model's context is reached)");
        }
        if self.interactive && self.flags.verbose {
            let speed = f64::from(usage.completion_tokens) / took.as_secs_f64().max(f64::MIN_POSITIVE);
            eprintln!(
                "({} tokens read, {} made, {speed:.1} a second)",
                usage.prompt_tokens, usage.completion_tokens
            );
        }
    }
}

/// Reasoning on stderr, faint on a terminal.
#[derive(Debug, Default)]
struct ShownReasoning {
    open: bool,
}

impl ShownReasoning {
    fn add(&mut self, piece: &str) {
        if !self.open && io::stderr().is_terminal() {
            eprint!("\x1b[2m");
        }
        self.open = true;
        eprint!("{piece}");
    }

    fn end(&mut self) {
        if std::mem::take(&mut self.open) {
            eprintln!("{}", if io::stderr().is_terminal() { "\x1b[0m" } else { "" });
        }
    }
}

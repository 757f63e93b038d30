//! Compiles grammars for one model, on threads of its own and within bounds.
//!
//! A caller's text is compiled on a thread with a large stack, where a panic ends that compilation alone. A
//! compilation holds its permit until it ends, even if the request that wanted it has gone. What bounds it is
//! the processor time of its thread, since a busy machine must not make a good format a wrong one.

use super::digits::DigitTokens;
use super::json::Json;
use super::memory::MAX_COMPILATIONS;
use super::thread_time::ThreadTime;
use super::vocabulary::Vocabulary;
use super::{JSON_SPACE, lark, pattern, plain, schema, shortened};
use crate::request::{Grammar, SubmitError};
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{InferenceCapabilities, TokEnv};
use llguidance::{ParserFactory, TokenParser};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use trustformers_model::Model;

/// States that the lexer of one running request may have, at 1 to 2 KiB each: at most 100 MiB, all of them
/// counted in the budget. Ordinary schemas need hundreds, patterns with long counts some thousands.
pub(super) const MAX_LEXER_STATES: usize = 50_000;

/// Stack of the thread that compiles: a grammar nests as deep as its text allows, and running out of stack
/// would end the process. Only what is used becomes memory.
const COMPILE_STACK_BYTES: usize = 256 * 1024 * 1024;

/// Processor time that one compilation may take. Ordinary schemas take milliseconds, the largest of
/// jsonschemabench some seconds.
const MAX_COMPILE_TIME: Duration = Duration::from_secs(10);

/// How long a request waits for its compilation, however little of the processor it gets: with
/// [`MAX_COMPILATIONS`] at a time, a compilation within its bound ends unless the machine runs more than six
/// threads on each processor.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// How long a request waits for a permit to compile.
const MAX_PERMIT_WAIT: Duration = Duration::from_secs(10);

/// Time between two looks at the processor time of a compilation.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Most bytes of the compiler's words in a refusal, which quote the caller's text.
const MAX_QUOTED_CHARS: usize = 200;

/// Compiles grammars for one model.
pub(super) struct Compiler {
    state: Arc<CompilerState>,
    permits: Arc<CompilePermits>,
}

struct CompilerState {
    model: Arc<Model>,
    /// Built by the warm-up, or by the first compilation where that comes first.
    factory: OnceLock<Result<Factory, String>>,
}

struct Factory {
    parsers: ParserFactory,
    digits: Arc<DigitTokens>,
}

/// A compiled grammar at its beginning.
pub(super) struct Compiled {
    pub(super) parser: TokenParser,
    /// For answers that are JSON, or hold it.
    pub(super) digits: Option<Arc<DigitTokens>>,
}

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled").finish_non_exhaustive()
    }
}

impl Compiler {
    pub(super) fn new(model: Arc<Model>) -> Self {
        Self { state: Arc::new(CompilerState { model, factory: OnceLock::new() }), permits: Arc::default() }
    }

    /// Builds what all compilations share. Takes some hundred milliseconds the first time.
    ///
    /// # Errors
    /// Why this model has no structured output, in the words of a refusal.
    pub(super) fn prepare(&self) -> Result<(), String> {
        self.state.factory().map(|_| ())
    }

    /// Takes milliseconds, and some hundred more where nothing was prepared.
    pub(super) fn compile(&self, grammar: &Grammar) -> Result<Compiled, SubmitError> {
        let invalid = |why: String| SubmitError::Invalid { field: "response_format", why };
        // What is made once for the model is not the request's time.
        self.prepare().map_err(invalid)?;
        let Some(permit) = CompilePermits::acquire(&self.permits, MAX_PERMIT_WAIT) else {
            let what = "the compiler for structured output of this model";
            return Err(SubmitError::Busy { what, retry_after: MAX_PERMIT_WAIT });
        };
        // One job sends one result.
        let (sender, receiver) = sync_channel(1);
        let (state, text) = (Arc::clone(&self.state), grammar.clone());
        let time = Arc::new(ThreadTime::default());
        let its_time = Arc::clone(&time);
        let thread = std::thread::Builder::new().name("grammar".to_owned()).stack_size(COMPILE_STACK_BYTES);
        let spawned = thread.spawn(move || {
            let _permit = permit;
            its_time.started();
            let compiled = catch_unwind(AssertUnwindSafe(|| state.compile(&text)));
            // Where the request has gone the result is dropped here.
            let _sent = sender.send(compiled.unwrap_or_else(|_| Err(failed(text.kind()))));
        });
        if let Err(error) = spawned {
            return Err(invalid(format!("no thread to compile the {}: {error}", grammar.kind())));
        }
        await_compiled(&receiver, grammar.kind(), &|| time.used())
    }
}

/// Waits for a compilation within its bounds; `used` is the processor time that it has taken.
fn await_compiled<T>(
    receiver: &Receiver<Result<T, String>>,
    kind: &str,
    used: &dyn Fn() -> Option<Duration>,
) -> Result<T, SubmitError> {
    let invalid = |why: String| SubmitError::Invalid { field: "response_format", why };
    let began = Instant::now();
    loop {
        match receiver.recv_timeout(LOOK_INTERVAL) {
            Ok(compiled) => return compiled.map_err(invalid),
            Err(RecvTimeoutError::Disconnected) => return Err(invalid(failed(kind))),
            Err(RecvTimeoutError::Timeout) => {}
        }
        // Where the system does not count it, wall time bounds it.
        if used().unwrap_or_else(|| began.elapsed()) > MAX_COMPILE_TIME {
            return Err(invalid(format!(
                "the {kind} takes longer than {} s to compile; make it smaller",
                MAX_COMPILE_TIME.as_secs()
            )));
        }
        if began.elapsed() > MAX_WAIT {
            let what = "the processor, on which the format is compiled";
            return Err(SubmitError::Busy { what, retry_after: MAX_PERMIT_WAIT });
        }
    }
}

fn failed(kind: &str) -> String {
    format!("the {kind} cannot be compiled: the compiler failed on it; simplify it")
}

impl CompilerState {
    /// The vocabulary as the compiler needs it. A panic of the library on a model's vocabulary refuses every
    /// request with a format; the model's other requests are served.
    fn factory(&self) -> Result<&Factory, String> {
        let build = || {
            catch_unwind(AssertUnwindSafe(|| factory(&self.model))).unwrap_or_else(|_| {
                tracing::error!("the grammar compiler panicked on the model's vocabulary");
                Err("the model's vocabulary cannot be used for structured output; leave the format out"
                    .to_owned())
            })
        };
        self.factory.get_or_init(build).as_ref().map_err(Clone::clone)
    }

    fn compile(&self, grammar: &Grammar) -> Result<Compiled, String> {
        let kind = grammar.kind();
        let Described { top, paths, limit_digits } = described(grammar)?;
        let factory = self.factory()?;
        let explain = |message: &str| explained(kind, message, &paths);
        let mut parser =
            factory.parsers.create_parser(top).map_err(|error| explain(&format!("{error:#}")))?;
        // The first mask shows whether an answer can begin at all, and is cached for every request.
        let first = llguidance::panic_utils::catch_unwind(AssertUnwindSafe(|| {
            parser.start_without_prompt();
            parser.compute_mask()
        }));
        first.map_err(|error| explain(&format!("no answer satisfies it: {error}")))?;
        Ok(Compiled { parser, digits: limit_digits.then(|| Arc::clone(&factory.digits)) })
    }
}

/// A grammar in the compiler's words.
struct Described {
    top: TopLevelGrammar,
    /// The caller's paths of the schemas that it refers to.
    paths: Vec<String>,
    /// Whether numbers must end, see [`super::digits`].
    limit_digits: bool,
}

fn described(grammar: &Grammar) -> Result<Described, String> {
    let json = |text: &str| {
        let json = Json::parse(text)
            .map_err(|why| format!("the JSON schema is not JSON: {}", shortened(&why, MAX_QUOTED_CHARS)))?;
        let rewritten = schema::rewrite(&json, JSON_SPACE)
            .map_err(|refusal| format!("the JSON schema cannot be honoured: {refusal}"))?;
        let top = TopLevelGrammar::from_json_schema(rewritten.schema);
        Ok(Described { top, paths: rewritten.paths, limit_digits: true })
    };
    let refused = |why: String| {
        format!("the {} cannot be compiled: {}", grammar.kind(), shortened(&why, MAX_QUOTED_CHARS))
    };
    match grammar {
        Grammar::JsonObject => json(r#"{"type": "object"}"#),
        Grammar::JsonSchema(text) => json(text),
        Grammar::Regex(text) => {
            let text = pattern::whole(text).map_err(refused)?;
            let top = TopLevelGrammar::from_regex(&text);
            Ok(Described { top, paths: Vec::new(), limit_digits: false })
        }
        Grammar::Lark(text) => {
            let rewritten = lark::rewrite(text).map_err(refused)?;
            let top = TopLevelGrammar::from_lark(rewritten.text);
            Ok(Described { top, paths: Vec::new(), limit_digits: rewritten.limit_digits })
        }
    }
}

fn factory(model: &Arc<Model>) -> Result<Factory, String> {
    let began = Instant::now();
    let vocabulary: TokEnv = Arc::new(Vocabulary::new(model)?);
    let mut parsers = ParserFactory::new(
        &vocabulary,
        InferenceCapabilities::default(),
        &SlicedBiasComputer::general_slices(),
    )
    .map_err(|error| plain(&format!("{error:#}")))?;
    parsers.quiet();
    *parsers.limits_mut() =
        ParserLimits { max_lexer_states: MAX_LEXER_STATES, verbose_errors: false, ..ParserLimits::default() };
    tracing::debug!(
        tokens = model.tokenizer().len(),
        ms = began.elapsed().as_millis(),
        "the vocabulary is ready for structured output"
    );
    Ok(Factory { parsers, digits: Arc::new(DigitTokens::new(model)) })
}

/// A refusal of the compiler in the words of a caller.
fn explained(kind: &str, message: &str, paths: &[String]) -> String {
    if message.contains("panic: ") {
        tracing::error!(kind, message, "the grammar compiler panicked on a request");
        return failed(kind);
    }
    let mut message = plain(message);
    if message.contains("coerce_one_of") {
        "\"oneOf\": two of its schemas may hold for one value, which is not supported; use \"anyOf\", or give each a \
         type, constant or range of its own"
            .clone_into(&mut message);
    }
    if message.contains("initial_lexer_fuel") {
        "its expressions are too large together; simplify them".clone_into(&mut message);
    }
    message = message.replace("NoExtensionBias", "no token of the model can begin it");
    for (index, path) in paths.iter().enumerate().rev() {
        message = message.replace(&format!("#/$defs/r{index}"), path);
    }
    format!("the {kind} cannot be compiled: {}", shortened(&message, MAX_QUOTED_CHARS))
}

/// How many compilations run.
#[derive(Debug, Default)]
struct CompilePermits {
    running: Mutex<usize>,
    freed: Condvar,
}

/// One running compilation.
struct CompilePermit(Arc<CompilePermits>);

impl CompilePermits {
    /// Waits at most `timeout` for fewer than [`MAX_COMPILATIONS`].
    fn acquire(permits: &Arc<Self>, timeout: Duration) -> Option<CompilePermit> {
        let running = permits.running.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut running, _) = permits
            .freed
            .wait_timeout_while(running, timeout, |running| *running >= MAX_COMPILATIONS)
            .unwrap_or_else(PoisonError::into_inner);
        if *running >= MAX_COMPILATIONS {
            return None;
        }
        *running += 1;
        Some(CompilePermit(Arc::clone(permits)))
    }
}

impl Drop for CompilePermit {
    fn drop(&mut self) {
        *self.0.running.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_bounded_and_come_back() {
        let permits = Arc::<CompilePermits>::default();
        let acquire = || CompilePermits::acquire(&permits, Duration::ZERO);
        let permits_in_use: Vec<_> = (0..MAX_COMPILATIONS).map(|_| acquire().unwrap()).collect();
        assert!(acquire().is_none());
        drop(permits_in_use);
        assert!(acquire().is_some());
    }

    #[test]
    fn a_compilation_is_bounded_by_its_processor_time() {
        let (_sender, receiver) = sync_channel::<Result<(), String>>(1);
        let used = || Some(MAX_COMPILE_TIME + Duration::from_millis(1));
        let error = await_compiled(&receiver, "JSON schema", &used).unwrap_err();
        assert!(error.to_string().contains("takes longer than 10 s to compile"), "{error}");
        // One that waited for the processor is not refused, however long that took.
        let (sender, receiver) = sync_channel(1);
        let looks = std::cell::Cell::new(0);
        let waits = || {
            looks.set(looks.get() + 1);
            if looks.get() == 2 {
                sender.send(Ok(7)).unwrap();
            }
            Some(Duration::ZERO)
        };
        assert_eq!(await_compiled(&receiver, "JSON schema", &waits).unwrap(), 7);
    }

    #[test]
    fn words_of_the_compiler_become_those_of_a_caller() {
        let paths = ["#/definitions/a".to_owned()];
        let explain = |message: &str| explained("JSON schema", message, &paths);
        assert!(explain("bad #/$defs/r0\n<non-verbose/>").ends_with(": bad #/definitions/a"));
        assert!(explain("Enable 'coerce_one_of' option").contains("use \"anyOf\""));
        let panicked = explain("panic: index out of bounds\n<backtrace>\n0: x\n</backtrace>");
        assert!(!panicked.contains("panic") && panicked.ends_with("simplify it"), "{panicked}");
        assert!(explain(&"x".repeat(100_000)).chars().count() < 300);
    }
}

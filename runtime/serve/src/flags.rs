//! The command line, and its help.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use trustformers_api::Aggregation;
use trustformers_runtime::metrics_compat::MetricsCompat;
use trustformers_telemetry::logs::LogFormat;

/// Serves models over HTTP and gRPC in one process; with `generate`, `embed`, `classify` or `rerank`,
/// answers once and ends; with `chat`, holds a conversation; with `bench`, measures.
///
/// Without a subcommand it reads config.yaml of the working directory (or
/// --config), listens, loads the models in the background and serves until SIGINT
/// (Ctrl-C) or SIGTERM; then answers in flight are given before it ends. A second
/// Ctrl-C ends at once. While it serves, it reads the file again every second:
/// models that are added, changed or removed there are loaded and unloaded.
///
///   trustformers-serve --print-config-example > config.yaml
///   trustformers-serve
///   curl -d '{"prompt": "The capital of France is"}' localhost:8080/v1/generate
#[derive(Debug, Parser)]
#[command(version, max_term_width = 110, verbatim_doc_comment, args_conflicts_with_subcommands = true)]
pub(crate) struct Flags {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) serve: ServeFlags,
    /// Log lines as text or json, on stderr.
    #[arg(long, global = true, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or directives such as info,trustformers_engine=debug.
    /// By default info when serving, else warn.
    #[arg(long, global = true, value_name = "FILTER", env = "RUST_LOG")]
    pub(crate) log: Option<String>,
}

/// How to serve.
#[derive(Debug, Args)]
pub(crate) struct ServeFlags {
    /// The configuration, instead of config.yaml of the working directory: keys as in --print-config-example,
    /// or InferenceModel documents.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Where there is no config.yaml, serves every model of this folder: each .gguf file under its name
    /// without .gguf, each folder with model.safetensors under the folder's name.
    #[arg(long, value_name = "FOLDER", conflicts_with = "config")]
    pub(crate) models: Option<PathBuf>,
    /// Prints a configuration to begin with, and ends.
    #[arg(long)]
    pub(crate) print_config_example: bool,
    #[command(flatten)]
    pub(crate) server: ServerFlags,
}

/// What overrides a configuration.
#[derive(Debug, Args)]
pub(crate) struct ServerFlags {
    /// The address to listen on, instead of server.host.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) host: Option<IpAddr>,
    /// HTTP's port, instead of server.port; 0 takes any that is free.
    #[arg(long, value_name = "PORT")]
    pub(crate) port: Option<u16>,
    /// gRPC's port, instead of server.grpc_port; 0 takes any that is free.
    #[arg(long, value_name = "PORT")]
    pub(crate) grpc_port: Option<u16>,
    /// The files of the InferenceModel of this name, instead of its spec.source.uri. May be given several
    /// times.
    #[arg(long, value_name = "NAME=PATH", value_parser = named_path)]
    pub(crate) source: Vec<(String, String)>,
    /// Threads of the CPU device; by default as many as the process may use.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// Adds the figures of /metrics under the names of another server: vllm.
    #[arg(long, value_name = "SERVER")]
    pub(crate) metrics_compat: Option<MetricsCompat>,
    /// Prints the configuration in force, with defaults and what these flags override, and ends. The output
    /// is a config.yaml.
    #[arg(long)]
    pub(crate) print_config: bool,
}

fn named_path(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, path)| !name.is_empty() && !path.is_empty());
    let pair = pair.map(|(name, path)| (name.to_owned(), path.to_owned()));
    pair.ok_or_else(|| "expected a model and its files, such as smollm2=/models/smollm2.gguf".to_owned())
}

/// A file to serve.
#[derive(Debug, Args)]
pub(crate) struct RunFlags {
    /// A file of InferenceModel documents, a config.yaml, or a model of another machine: hf://org/name.
    #[arg(value_name = "FILE|URI")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) server: ServerFlags,
}

/// What to do instead of serving.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serves the models of a file, such as the InferenceModel that a cluster gets.
    ///
    /// The file holds one or more documents: InferenceModels, and at most one with the keys of a config.yaml
    /// (where to listen). Fields that mean something in a cluster only (replicas, pods, gateways) are refused
    /// where they differ from their defaults. Serves and follows the file as without a subcommand.
    ///
    /// A model of another machine is fetched into a cache (TRUSTFORMERS_CACHE_DIR, by default
    /// ~/.cache/trustformers): hf://org/name[/file][@revision], s3://, gs://, az://, https://, oci://.
    /// Credentials are read from the environment by their usual names: HF_TOKEN, AWS_ACCESS_KEY_ID, ...
    ///
    ///   trustformers-serve run model.yaml
    ///   trustformers-serve run hf://org/name
    #[command(verbatim_doc_comment)]
    Run(RunFlags),
    /// Answers one prompt: text to stdout as it is made, or with --json one object at the end.
    ///
    /// Special tokens that are spelled in the prompt (such as <|im_start|>) are recognised. A begin token is
    /// put before it only where the model's file asks for one. Progress and logs go to stderr.
    ///
    /// Exit status: 0 answered; 1 the model could not be loaded or failed; 2 the command line or the prompt
    /// is wrong; 130 interrupted.
    Generate(GenerateFlags),
    /// Holds a conversation on the terminal: each line is a message, each answer is printed as it is made.
    ///
    /// The model's own chat template renders the messages. /help lists the commands (instructions, a new
    /// conversation, saving). Ctrl-C ends an answer, Ctrl-D the conversation. Without a terminal each line of
    /// stdin is a message, answers go to stdout and all else to stderr; the first refusal ends the run.
    ///
    /// Exit status: 0 the conversation ended; 1 the model could not be loaded or failed; 2 the command line
    /// or a message is wrong; 130 interrupted.
    Chat(ChatFlags),
    /// Turns texts into vectors: a line of numbers for each on stdout, or with --json one object.
    ///
    /// The model is a checkpoint that embeds: a folder with model.safetensors, config.json and
    /// tokenizer.json. Texts that are too long are cut as its files say. Progress and logs go to stderr.
    ///
    /// Exit status: 0 done; 1 the model could not be loaded or failed; 2 the command line or a text is wrong;
    /// 130 interrupted.
    Embed(EmbedFlags),
    /// Gives texts the scores of a model's labels: a line for each text on stdout, or with --json one object.
    ///
    /// The model is a checkpoint whose head labels texts, or the tokens of a text: a folder with
    /// model.safetensors, config.json (which names the labels) and tokenizer.json. Or it is a GGUF file of a
    /// BERT or RoBERTa with such a head for texts.
    ///
    /// Exit status: as of embed.
    Classify(ClassifyFlags),
    /// Orders documents by how well they answer a query: a line for each, best first, or with --json one
    /// object.
    ///
    /// The model is a cross-encoder: a checkpoint, or a GGUF file of a BERT or RoBERTa, whose head for texts
    /// has one logit. Or it is a Qwen3-Reranker.
    ///
    /// Exit status: as of embed.
    Rerank(RerankFlags),
    /// Describes a model without serving it: architecture, parameters, types, tokens, memory of the cache.
    ///
    /// The model is read and checked as a server does it, so that a key, tensor or type that is not supported
    /// is named here.
    ///
    /// Exit status: 0 it can be served; 1 it cannot; 2 the command line is wrong.
    Inspect(crate::inspect::InspectFlags),
    /// Measures speed: of an engine in this process, or of a server under load.
    Bench(crate::bench::BenchFlags),
}

/// How a model is computed.
#[derive(Debug, Args)]
pub(crate) struct DeviceFlags {
    /// fast: activations may be quantised. exact: f32 activations, the same alone or batched.
    #[arg(long, value_name = "fast|exact", default_value = "fast")]
    pub(crate) numerics: String,
    /// The type in which keys and values are cached. auto: what the device is fastest with; f32 in exact.
    #[arg(long, value_name = "auto|f32|f16|bf16", default_value = "auto")]
    pub(crate) kv_cache: String,
    /// Threads of the CPU device; by default as many as the process may use.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
}

/// How tokens are chosen and where the answer ends.
#[derive(Debug, Args)]
pub(crate) struct OptionFlags {
    /// Samples from this many best tokens only; 0: from all.
    #[arg(long, value_name = "N")]
    pub(crate) top_k: Option<u32>,
    /// Samples only from tokens with at least this share (0 to 1) of the best one's probability.
    #[arg(long, value_name = "P")]
    pub(crate) min_p: Option<f32>,
    /// Samples from the most typical tokens that together have this probability, above 0 and at most 1.
    #[arg(long, value_name = "P")]
    pub(crate) typical_p: Option<f32>,
    /// Above 1 (to 10): what prompt and answer hold already becomes less likely; below 1: more.
    #[arg(long, value_name = "R")]
    pub(crate) repetition_penalty: Option<f32>,
    /// Taken from the logit of what the answer holds already, -2 to 2.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f32>,
    /// Taken from a logit as often as its token is in the answer, -2 to 2.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Added to the logit of a token, -100 to 100, such as 42=-5. May be given several times.
    #[arg(long, value_name = "ID=BIAS", value_parser = bias)]
    pub(crate) logit_bias: Vec<(u32, f32)>,
    /// With --json: each token's log probability and those of this many of the best, 0 to 20.
    #[arg(long, value_name = "N", requires = "json")]
    pub(crate) logprobs: Option<u32>,
    /// A text that ends the answer and is not part of it. May be given several times, at most 16.
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// A token that ends the answer. May be given several times, at most 64.
    #[arg(long, value_name = "ID")]
    pub(crate) stop_token_id: Vec<u32>,
    /// The answer is JSON that the JSON schema of this file describes.
    #[arg(long, value_name = "FILE", group = "format")]
    pub(crate) json_schema: Option<PathBuf>,
    /// The answer is a JSON object.
    #[arg(long, group = "format")]
    pub(crate) json_object: bool,
    /// The answer as a whole matches this regular expression (Rust's regex syntax).
    #[arg(long, value_name = "REGEX", group = "format")]
    pub(crate) regex: Option<String>,
    /// The answer is of the context-free grammar of this file (Lark, as llguidance reads it; it begins at
    /// start).
    #[arg(long, value_name = "FILE", group = "format")]
    pub(crate) grammar: Option<PathBuf>,
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let pair = text.split_once('=').and_then(|(id, bias)| Some((id.parse().ok()?, bias.parse().ok()?)));
    pair.ok_or_else(|| "expected a token id and a number, such as 42=-5".to_owned())
}

/// Texts and the model that embeds them.
#[derive(Debug, Args)]
pub(crate) struct EmbedFlags {
    /// The model: its folder, as a path or a URI (file, hf, s3, gs, az, https, oci).
    #[arg(long, value_name = "PATH|URI")]
    pub(crate) model: String,
    /// A text; an empty one has a vector, too. May be given several times.
    #[arg(long, value_name = "TEXT", required_unless_present = "input_file", conflicts_with = "input_file")]
    pub(crate) input: Vec<String>,
    /// A file with one text a line, empty ones too; lines end in \\n. Must be UTF-8.
    #[arg(long, value_name = "FILE")]
    pub(crate) input_file: Option<PathBuf>,
    /// Texts that are too long are an error instead of being cut.
    #[arg(long)]
    pub(crate) no_truncate: bool,
    #[command(flatten)]
    pub(crate) device: DeviceFlags,
    /// Prints one JSON object: data (index and embedding of each text), usage, timings_ms; truncated (places
    /// of texts that were cut) and pooling_note (where the model's files do not say how to pool) only where
    /// there are any.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A model that gives scores, and how they are given.
#[derive(Debug, Args)]
pub(crate) struct ScoreFlags {
    /// The model: its folder, as a path or a URI (file, hf, s3, gs, az, https, oci).
    #[arg(long, value_name = "PATH|URI")]
    pub(crate) model: String,
    /// The scores are the logits as the model gives them.
    #[arg(long)]
    pub(crate) raw_scores: bool,
    /// Texts that are too long are an error instead of being cut.
    #[arg(long)]
    pub(crate) no_truncate: bool,
    #[command(flatten)]
    pub(crate) device: DeviceFlags,
    /// Prints one JSON object: results, usage, timings_ms; truncated (places of texts that were cut) only
    /// where there are any.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Texts and the model that classifies them.
#[derive(Debug, Args)]
pub(crate) struct ClassifyFlags {
    /// A text; an empty one has scores, too. May be given several times.
    #[arg(long, value_name = "TEXT", required_unless_present = "input_file", conflicts_with = "input_file")]
    pub(crate) input: Vec<String>,
    /// A file with one text a line, empty ones too; lines end in \\n. Must be UTF-8.
    #[arg(long, value_name = "FILE")]
    pub(crate) input_file: Option<PathBuf>,
    /// Only this many labels of each text, best first.
    #[arg(long, value_name = "N")]
    pub(crate) top_k: Option<u32>,
    /// Of a model that labels tokens, how they become entities: none (the default), simple, first, average or
    /// max.
    #[arg(long, value_name = "WORD")]
    pub(crate) aggregation_strategy: Option<Aggregation>,
    #[command(flatten)]
    pub(crate) score: ScoreFlags,
}

/// A query, documents and the model that compares them.
#[derive(Debug, Args)]
pub(crate) struct RerankFlags {
    /// What the documents are to answer.
    #[arg(long, value_name = "TEXT")]
    pub(crate) query: String,
    /// A document. May be given several times.
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "documents_file",
        conflicts_with = "documents_file"
    )]
    pub(crate) document: Vec<String>,
    /// A file with one document a line, empty ones too; lines end in \\n. Must be UTF-8.
    #[arg(long, value_name = "FILE")]
    pub(crate) documents_file: Option<PathBuf>,
    /// Only this many of the best documents.
    #[arg(long, value_name = "N")]
    pub(crate) top_n: Option<u32>,
    #[command(flatten)]
    pub(crate) score: ScoreFlags,
}

/// A model and how it answers in a conversation.
#[derive(Debug, Args)]
pub(crate) struct ChatFlags {
    /// The model: a .gguf file or a folder that holds one or a checkpoint, as a path or a URI (file, hf, s3,
    /// gs, az, https, oci). It must have a chat template.
    #[arg(long, value_name = "PATH|URI")]
    pub(crate) model: String,
    /// Instructions for the whole conversation.
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// New tokens of an answer at most.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub(crate) max_tokens: u32,
    /// 0 is greedy: the same conversation gives the same answer. Higher is more varied.
    #[arg(long, value_name = "T", default_value_t = 0.7)]
    pub(crate) temperature: f32,
    /// Samples from the likeliest tokens that together have this probability.
    #[arg(long, value_name = "P", default_value_t = 0.9)]
    pub(crate) top_p: f32,
    /// Makes sampling repeatable.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Prints the tokens and the speed of each answer, on a terminal.
    #[arg(long)]
    pub(crate) verbose: bool,
    #[command(flatten)]
    pub(crate) device: DeviceFlags,
}

/// One prompt and how to answer it.
#[derive(Debug, Args)]
pub(crate) struct GenerateFlags {
    /// The model: a .gguf file or a folder that holds one, as a path or a URI (file, hf, s3, gs, az, https,
    /// oci).
    #[arg(long, value_name = "PATH|URI")]
    pub(crate) model: String,
    /// The text to continue.
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "prompt_file",
        conflicts_with = "prompt_file"
    )]
    pub(crate) prompt: Option<String>,
    /// A file whose bytes are the text to continue, a final newline included. Must be UTF-8.
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// New tokens at most, the end token included.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) max_tokens: u32,
    /// 0 is greedy: the same prompt gives the same answer. Higher is more varied.
    #[arg(long, value_name = "T", default_value_t = 0.7)]
    pub(crate) temperature: f32,
    /// Samples from the likeliest tokens that together have this probability.
    #[arg(long, value_name = "P", default_value_t = 0.9)]
    pub(crate) top_p: f32,
    /// Makes sampling repeatable.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    #[command(flatten)]
    pub(crate) options: OptionFlags,
    /// A smaller model of the same vocabulary guesses tokens, and the model checks several in one step: the
    /// same answer, sooner. As --model.
    #[arg(long, value_name = "PATH|URI", conflicts_with = "ngram")]
    pub(crate) draft: Option<String>,
    /// Tokens are guessed from what followed the same words before: the same answer, sooner where texts
    /// repeat themselves.
    #[arg(long)]
    pub(crate) ngram: bool,
    #[command(flatten)]
    pub(crate) device: DeviceFlags,
    /// Prints one JSON object: prompt_tokens, tokens (ids, the end token included when it was produced),
    /// text, finish_reason, timings_ms; with --logprobs also logprobs, and stopped_by where a stop text or
    /// token ended it.
    #[arg(long)]
    pub(crate) json: bool,
}

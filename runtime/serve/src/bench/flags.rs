//! The flags of `bench`, and their help.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::arrivals::Spacing;
use super::protocol::Api;
use crate::flags::DeviceFlags;

/// What to measure.
#[derive(Debug, Args)]
pub(crate) struct BenchFlags {
    #[command(subcommand)]
    pub(super) what: BenchWhat,
}

/// The measurements.
#[derive(Debug, Subcommand)]
pub(super) enum BenchWhat {
    /// What the engine gives in this process, with no network: reading prompts, and producing tokens alone,
    /// at depth and several sequences at once; or embedding texts.
    ///
    /// Every figure goes through the whole engine (scheduler, cache, device, choice of the token), as a
    /// request does. Prompts are made-up token ids, each another, so that nothing is answered from memory;
    /// the end token is biased away, so that every answer has its length. A model that embeds is measured in
    /// texts, with --texts. After one unmeasured turn all measurements take turns
    /// --repeat times; medians are printed with the smallest and the largest.
    ///
    ///   trustformers-serve bench engine --model model.gguf
    ///   trustformers-serve bench engine --model m.gguf --prefill 512 --depth 0,512 --sequences 1,8 --json
    ///   trustformers-serve bench engine --model all-minilm-l6-v2 --texts 1,32 --text-tokens 128
    #[command(verbatim_doc_comment)]
    Engine(EngineFlags),
    /// How a server answers under load: first token, time per token, tokens and requests a second, errors by
    /// class.
    ///
    /// It speaks to this server and to others, so that both are measured by one client. In a closed loop
    /// (--clients) each client asks again when it was answered: that finds what a server can do. In an open
    /// loop (--rate) requests come at times of their own and their times count from the moment at which they
    /// were due, waiting included: that finds what callers see. Prompts are made-up words, each another;
    /// about as many tokens as words. Requests that were answered make the figures; the others are counted by
    /// class. Only http:// is spoken.
    ///
    ///   trustformers-serve bench load --url http://127.0.0.1:8080 --clients 8
    ///   trustformers-serve bench load --url http://127.0.0.1:8080 --rate 5 --arrivals poisson
    ///   trustformers-serve bench load --url http://127.0.0.1:8080 --api embeddings --rate 200
    ///   trustformers-serve bench load --url http://127.0.0.1:8081 --api llama --extra '{"ignore_eos": true}'
    ///
    /// Exit status: 0 when at least one request was answered; 1 when none was; 2 when the command line is
    /// wrong.
    #[command(verbatim_doc_comment)]
    Load(LoadFlags),
}

/// How to measure an engine.
#[derive(Debug, Args)]
pub(super) struct EngineFlags {
    /// The model: a file, or a folder of files, as a path or a file:// URI.
    #[arg(long, value_name = "PATH|URI")]
    pub(super) model: String,
    /// Lengths of prompts, in tokens, whose reading is measured; 0: none.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "512")]
    pub(super) prefill: Vec<usize>,
    /// Tokens that stand in the cache when decoding is measured.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "0,512")]
    pub(super) depth: Vec<usize>,
    /// Sequences that are decoded at once, each after a prompt of --prompt-tokens; 0: none.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "8")]
    pub(super) sequences: Vec<usize>,
    /// Tokens of the prompts before --sequences.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(super) prompt_tokens: usize,
    /// Tokens that are produced in each measurement of decoding, 2 to 65536.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(super) tokens: usize,
    /// For a model that embeds: texts in one request, whose speed is measured, such as 1,32.
    #[arg(
        long,
        value_name = "N,..",
        value_delimiter = ',',
        conflicts_with_all = ["prefill", "depth", "sequences", "prompt_tokens", "tokens", "token_budget"]
    )]
    pub(super) texts: Vec<usize>,
    /// Tokens of each text.
    #[arg(long, value_name = "N", default_value_t = 128, requires = "texts")]
    pub(super) text_tokens: usize,
    /// Turns that are measured, 1 to 1000.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(super) repeat: usize,
    /// Most rows of one step; by default what a server has.
    #[arg(long, value_name = "N")]
    pub(super) token_budget: Option<usize>,
    #[command(flatten)]
    pub(super) device: DeviceFlags,
    /// Prints one JSON object: model, device, numerics and results (what, prompt_tokens and sequences or
    /// texts and text_tokens, unit, median, min, max, values).
    #[arg(long)]
    pub(super) json: bool,
}

/// How to load a server.
#[derive(Debug, Args)]
pub(super) struct LoadFlags {
    /// Scheme, host and port of the server; the route follows from --api.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    pub(super) url: String,
    /// The protocol.
    #[arg(long, value_enum, default_value_t = Api::Generate)]
    pub(super) api: Api,
    /// The model's name, where the server has several.
    #[arg(long, value_name = "NAME")]
    pub(super) model: Option<String>,
    /// Closed loop: so many clients, 1 to 1000. This is the default, with 8.
    #[arg(long, value_name = "N", conflicts_with = "rate")]
    pub(super) clients: Option<usize>,
    /// Open loop: so many requests a second, at most 10000.
    #[arg(long, value_name = "R")]
    pub(super) rate: Option<f64>,
    /// How the requests of an open loop are spread.
    #[arg(long, value_enum, default_value_t = Spacing::Poisson)]
    pub(super) arrivals: Spacing,
    /// Makes the times of an open loop repeatable.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) seed: u64,
    /// Requests at most, 1 to 1000000; by default five for each client, or as many as come in --duration-s.
    #[arg(long, value_name = "N")]
    pub(super) requests: Option<usize>,
    /// No request begins later than this, in seconds, up to 3600.
    #[arg(long, value_name = "S", default_value_t = 60.0)]
    pub(super) duration_s: f64,
    /// Requests made before, one after the other, and not counted.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) warm_up: usize,
    /// Words of each prompt or text.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(super) prompt_words: usize,
    /// A file of prompts, one a line, taken in turn, instead of made-up words. Must be UTF-8.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt_words")]
    pub(super) prompt_file: Option<PathBuf>,
    /// Texts in each request of embeddings.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) batch: usize,
    /// New tokens of each answer at most.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(super) max_tokens: u32,
    /// A JSON object whose fields are added to each request, such as {"ignore_eos": true}.
    #[arg(long, value_name = "JSON")]
    pub(super) extra: Option<String>,
    /// Opens a connection for each request. Some servers (llama-server is one) close a kept connection
    /// without a word, at times just when the next request is on its way.
    #[arg(long)]
    pub(super) fresh_connections: bool,
    /// A request that takes longer has failed, in seconds.
    #[arg(long, value_name = "S", default_value_t = 120.0)]
    pub(super) timeout_s: f64,
    /// Prints one JSON object: requests, answered, errors (by class), wall_s, requests_per_s, texts_per_s,
    /// prompt_tokens, output_tokens, output_tokens_per_s, and p50, p90, p99, max of first_token_ms,
    /// per_token_ms, longest_gap_ms and total_ms.
    #[arg(long)]
    pub(super) json: bool,
}

//! A loaded model: weights, tokenizer, facts, and the lowering to a plan.

use crate::arch::{self, Architecture};
use crate::chat::{ChatError, ChatTemplate, SpecialTokens};
use crate::checkpoint::decoder::is_decoder;
use crate::checkpoint::{CONFIG, CheckpointFiles};
use crate::encoder::{self, file::EncoderFile};
use crate::error::{LoadError, TokenizerProblem};
use crate::gguf::Gguf;
use crate::parts::{self, ModelPart};
use crate::reading::PairPrompt;
use crate::reading::file::FileRanking;
use crate::sampling::SamplingSettings;
use crate::score_head::{ScoreActivation, ScoreHead};
use crate::source::{OnRead, ReadProgress};
use crate::tokenizer::{EncodedPair, EncodedText, TokenSpans, Tokenizer, rows_with_token};
use serde::Deserialize;
use std::borrow::Cow;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use trustformers_plan::{
    AdapterRoom, FusedOps, Limits, Plan, PlanError, Pooling, Weight, WeightBytes, Weights,
};
use trustformers_proto::Task;

/// The warning about a file without an end token.
const NO_END_TOKEN: &str = "the file names no end token (key tokenizer.ggml.eos_token_id): answers end only at \
     max_tokens, the context or a stop text; convert the model again";

/// The key of the template for conversations with tools.
const TOOLS_TEMPLATE: &str = "tokenizer.chat_template.tool_use";

/// How an embedding model turns texts into vectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddingFacts {
    /// Values of a vector.
    pub width: usize,
    /// Tokens of the longest text, special tokens included; what is beyond is cut off.
    pub max_tokens: usize,
    /// How the rows of a text become one vector.
    pub pooling: Pooling,
    /// A note for answers about the pooling, where the checkpoint does not configure it.
    pub pooling_note: Option<String>,
    /// Whether vectors have length one.
    pub normalised: bool,
    /// The text that is put before every text; empty where the checkpoint has no default prompt.
    pub prompt: String,
    /// Fewest values that a vector may be cut to, from its end; `None`: the model was not trained for that.
    pub shortest: Option<usize>,
}

/// Fewest values of a vector of Qwen3-Embedding, as its card says.
const SHORTEST: usize = 32;

/// [`EmbeddingFacts::shortest`] of a decoder. No file says it: the beginning of a vector is a vector itself
/// for the family Qwen3-Embedding, which is known by architecture and pooling.
pub(crate) fn shortest(architecture: &str, pooling: Pooling, width: usize) -> Option<usize> {
    (architecture == "qwen3" && pooling == Pooling::Last).then_some(SHORTEST.min(width))
}

/// How a classifier, or a model that compares two texts, gives scores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassificationFacts {
    /// Values of the row that the device gives for a text, or for a token; [`Model::logits`] reads it.
    pub width: usize,
    /// The name of each logit.
    pub labels: Vec<String>,
    /// How logits become scores.
    pub activation: ScoreActivation,
    /// Whether each token of a text has scores, instead of the text.
    pub by_token: bool,
}

/// What a model's files say about it, for display, schedulers and APIs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFacts {
    /// The model's task.
    pub task: Task,
    /// The architecture's name, such as `llama`.
    pub architecture: String,
    /// The name that the file carries, if any.
    pub name: Option<String>,
    /// How many weights it has.
    pub parameters: u64,
    /// Longest sequence that it was trained for, in tokens; of an embedding model,
    /// [`EmbeddingFacts::max_tokens`].
    pub context_tokens: usize,
    /// How many tokens its vocabulary has. Rows of the embedding without a token do not count and are never
    /// produced.
    pub vocabulary: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Key and value heads per block.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Size of the file of its weights in bytes.
    pub file_bytes: u64,
    /// How texts become vectors; only of a model that embeds.
    pub embedding: Option<EmbeddingFacts>,
    /// What scores mean; only of a model that classifies or ranks.
    pub classification: Option<ClassificationFacts>,
    /// The chat template that the file carries, if any, as the Jinja text that it is.
    pub chat_template: Option<String>,
    /// What the operator of a server should know: the model loads, but something in its files is unusual.
    pub warnings: Vec<String>,
}

impl ModelFacts {
    /// Whether each token of a text has scores, instead of the text.
    #[must_use]
    pub fn labels_tokens(&self) -> bool {
        self.classification.as_ref().is_some_and(|classification| classification.by_token)
    }
}

/// What a plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanRequest {
    /// Longest sequence in tokens; bounded by the model's own context.
    pub context_tokens: usize,
    /// The largest step.
    pub limits: Limits,
    /// What the device has fused kernels for.
    pub fused: FusedOps,
}

/// A model that passed every check and can be run. Its weights are ranges of the mapped file.
#[derive(Debug)]
pub struct Model {
    pub(crate) weights: Arc<Weights>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) facts: ModelFacts,
    pub(crate) architecture: Box<dyn Architecture>,
    pub(crate) chat: Result<ChatTemplate, ChatError>,
    pub(crate) preparation: TextPreparation,
    pub(crate) sampling: SamplingSettings,
    /// Only of a model that classifies or ranks.
    pub(crate) score_head: Option<ScoreHead>,
}

/// The key of `config.json` that says what a checkpoint is.
#[derive(Deserialize)]
struct CheckpointKind {
    model_type: String,
}

/// What is done to a text before an embedding model's tokenizer reads it.
#[derive(Debug, Default)]
pub(crate) struct TextPreparation {
    /// The default prompt, put before the text.
    pub(crate) prompt: String,
    /// Whether prompt and text are lower-cased.
    pub(crate) lowercase: bool,
    /// The prompt that a query and a document are put into, of a decoder that ranks.
    pub(crate) pair: Option<PairPrompt>,
}

impl TextPreparation {
    fn apply<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let text = match self.prompt.as_str() {
            "" => Cow::Borrowed(text),
            prompt => Cow::Owned(format!("{prompt}{text}")),
        };
        if self.lowercase { Cow::Owned(text.to_lowercase()) } else { text }
    }
}

impl Model {
    /// Reads and checks a model: a GGUF file, or the folder of a checkpoint with all its files. Calls
    /// `progress` after each megabyte.
    ///
    /// # Errors
    /// The first problem of a file, by name; [`LoadError::is_transient`] separates failing storage from bad
    /// content.
    pub fn load(path: &Path, progress: &mut dyn FnMut(ReadProgress)) -> Result<Self, LoadError> {
        Self::load_while(path, &mut |read| {
            progress(read);
            ControlFlow::Continue(())
        })
    }

    /// [`Self::load`], which ends early where `progress` says so.
    ///
    /// # Errors
    /// As [`Self::load`], and [`LoadError::Stopped`].
    pub fn load_while(path: &Path, progress: &mut OnRead<'_>) -> Result<Self, LoadError> {
        if path.is_dir() {
            return Self::load_checkpoint_while(&CheckpointFiles::of_folder(path)?, progress);
        }
        match parts::beside(path) {
            Some(paths) => {
                Self::load_files_while(&paths.iter().map(PathBuf::as_path).collect::<Vec<_>>(), progress)
            }
            None => Self::load_files_while(&[path], progress),
        }
    }

    /// Reads and checks a model in one GGUF file, or in all parts that it was split into, in their order.
    ///
    /// # Errors
    /// As [`Self::load_while`].
    pub fn load_files_while(paths: &[&Path], progress: &mut OnRead<'_>) -> Result<Self, LoadError> {
        Self::from_parts(parts::read(paths, progress)?)
    }

    /// Reads and checks a checkpoint, as [`Self::load_while`] does. Reads no other files than these.
    ///
    /// # Errors
    /// As [`Self::load_while`].
    pub fn load_checkpoint_while(
        files: &CheckpointFiles,
        progress: &mut OnRead<'_>,
    ) -> Result<Self, LoadError> {
        let CheckpointKind { model_type } = files.json(CONFIG)?;
        if is_decoder(&model_type) {
            return crate::generator::load(files, &model_type, progress);
        }
        encoder::load(files, progress)
    }

    /// Checks a GGUF file that is in memory already. `path` is only used in messages.
    ///
    /// # Errors
    /// The first problem of the content, by name.
    pub fn from_bytes(path: &Path, file: WeightBytes) -> Result<Self, LoadError> {
        let gguf = Gguf::parse((*file).as_ref()).map_err(|problem| LoadError::gguf(path, problem))?;
        let parts = vec![ModelPart { path: path.to_owned(), gguf, file }];
        parts::check(&parts)?;
        Self::from_parts(parts)
    }

    /// Checks the files of a model, of which the first has the keys; there is at least one.
    fn from_parts(parts: Vec<ModelPart>) -> Result<Self, LoadError> {
        let mut weights = weights(&parts)?;
        let file_bytes = parts.iter().map(|part| (*part.file).as_ref().len()).sum();
        let mut parts = parts.into_iter();
        let Some(ModelPart { path, mut gguf, file }) = parts.next() else {
            return Err(LoadError::NotAFile { path: PathBuf::new() });
        };
        gguf.tensors.extend(parts.flat_map(|part| part.gguf.tensors));
        let (path, bytes): (&Path, &[u8]) = (&path, (*file).as_ref());
        let wrong = |problem| LoadError::gguf(path, problem);
        let name = gguf.metadata.string("general.architecture").map_err(wrong)?;
        if let Some(architecture) = arch::bert_file::of_name(name) {
            let file = EncoderFile { path, gguf: &gguf, bytes, file_bytes, architecture };
            return encoder::file::load(&file, &weights);
        }
        let ranking = FileRanking::take(name, &gguf, bytes, &mut weights).map_err(wrong)?;
        let architecture = match arch::resolve(name, &gguf, &mut weights) {
            Some(resolved) => resolved.map_err(wrong)?,
            None => {
                return Err(LoadError::Architecture {
                    path: path.to_owned(),
                    found: name.to_owned(),
                    supported: arch::supported(),
                });
            }
        };
        let tokenizer = Tokenizer::from_gguf(&gguf, bytes)
            .map_err(|problem| LoadError::Tokenizer { path: path.to_owned(), problem })?;
        let mut facts = facts(&gguf, &*architecture, file_bytes).map_err(wrong)?;
        if facts.task == Task::Generate && tokenizer.eos_ids().is_empty() {
            facts.warnings.push(NO_END_TOKEN.to_owned());
        }
        check_vocabulary(&tokenizer, &facts).map_err(wrong)?;
        let chat = chat(&gguf, &tokenizer, facts.chat_template.as_deref()).map_err(wrong)?;
        let weights = Arc::new(weights);
        let preparation = TextPreparation::default();
        let sampling = SamplingSettings::of_gguf(&gguf.metadata, &mut facts.warnings);
        let mut model =
            Self { weights, tokenizer, facts, architecture, chat, preparation, sampling, score_head: None };
        if let Some(ranking) = ranking {
            ranking.apply(path, &mut model)?;
        }
        model.check_plan().map_err(|problem| LoadError::Plan { path: path.to_owned(), problem })?;
        Ok(model)
    }

    /// Lowers the smallest plan, so that a model that cannot be lowered is refused at load.
    pub(crate) fn check_plan(&self) -> Result<(), PlanError> {
        let limits = Limits { rows: 1, sequences: 1, logits_rows: 1 };
        let context_tokens = self.facts.context_tokens;
        self.plan(&PlanRequest { context_tokens, limits, fused: FusedOps::default() }).map(|_| ())
    }

    /// Lowers the model to a plan for these limits and this device.
    ///
    /// # Errors
    /// Limits that are zero or larger than memory.
    pub fn plan(&self, request: &PlanRequest) -> Result<Plan, PlanError> {
        self.architecture.plan(&self.weights, request)
    }

    /// [`Self::plan`] with room for adapters. No projection of it applies an activation.
    ///
    /// # Errors
    /// As [`Self::plan`].
    pub fn plan_with_adapters(&self, request: &PlanRequest, room: AdapterRoom) -> Result<Plan, PlanError> {
        if room.is_none() {
            return self.plan(request);
        }
        let fused = request.fused.without_activations();
        self.plan(&PlanRequest { fused, ..*request })?.with_adapters(room)
    }

    /// The ids of a text as an embedding model reads it: with the model's default prompt before it, special
    /// tokens around both, and cut where it is longer than [`ModelFacts::context_tokens`].
    ///
    /// # Errors
    /// The tokenizer library's own; none is known for valid UTF-8.
    pub fn encode(&self, text: &str) -> Result<EncodedText, TokenizerProblem> {
        self.encode_up_to(text, self.facts.context_tokens)
    }

    /// [`Self::encode`] that cuts at `max_tokens`, special tokens included.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_up_to(&self, text: &str, max_tokens: usize) -> Result<EncodedText, TokenizerProblem> {
        let most = max_tokens.min(self.facts.context_tokens);
        self.tokenizer.encode_up_to(&self.preparation.apply(text), most)
    }

    /// The ids of two texts that a model reads together, at most `max_tokens` with special tokens, and
    /// never more than [`ModelFacts::context_tokens`]. Where they are too long the longer one is cut
    /// first. A default prompt is for single texts and not put before them.
    ///
    /// # Errors
    /// A tokenizer whose template has no form for two texts; else as [`Self::encode`].
    pub fn encode_pair(
        &self,
        first: &str,
        second: &str,
        max_tokens: usize,
    ) -> Result<EncodedPair, TokenizerProblem> {
        let most = max_tokens.min(self.facts.context_tokens);
        if let Some(prompt) = &self.preparation.pair {
            return prompt.encode(&self.tokenizer, [first, second], most);
        }
        if self.preparation.lowercase {
            return self.tokenizer.encode_pair(&first.to_lowercase(), &second.to_lowercase(), most);
        }
        self.tokenizer.encode_pair(first, second, most)
    }

    /// The tokens of a text that a model which labels tokens reads, with their places in it; as many as
    /// [`Self::encode_up_to`] gives.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn token_spans(&self, text: &str, max_tokens: usize) -> Result<TokenSpans, TokenizerProblem> {
        self.tokenizer.spans_up_to(text, max_tokens.min(self.facts.context_tokens))
    }

    /// How many tokens are put around every text, or around every pair where a prompt surrounds both texts.
    pub fn special_tokens(&self) -> usize {
        let prompt = self.preparation.pair.as_ref().map_or(0, PairPrompt::len);
        prompt.max(self.tokenizer.special_tokens())
    }

    /// The logits of a text, or of a token, from its row of a model that classifies or ranks; `None` of
    /// others. They become scores by [`ClassificationFacts::activation`].
    pub fn logits(&self, row: &[f32]) -> Option<Vec<f32>> {
        self.score_head.as_ref().map(|head| head.logits(row))
    }

    /// The template that renders a conversation to a prompt.
    ///
    /// # Errors
    /// The model has no template, or its template cannot be used.
    pub fn chat(&self) -> Result<&ChatTemplate, ChatError> {
        self.chat.as_ref().map_err(Clone::clone)
    }

    /// The settings of sampling that the model's files recommend.
    pub fn sampling(&self) -> &SamplingSettings {
        &self.sampling
    }

    /// The model's task.
    pub fn task(&self) -> Task {
        self.facts.task
    }

    /// The weights that plans refer to.
    pub fn weights(&self) -> &Arc<Weights> {
        &self.weights
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// What the model's files say about it.
    pub fn facts(&self) -> &ModelFacts {
        &self.facts
    }
}

/// The tensors of all files. Those with a row per token lose the rows without a token: no prompt can contain
/// such a row's id, and no answer may.
fn weights(parts: &[ModelPart]) -> Result<Weights, LoadError> {
    let first = parts.first().and_then(|part| rows_with_token(&part.gguf, (*part.file).as_ref()));
    let used_rows = first.unwrap_or(usize::MAX);
    let mut weights = Weights::new();
    for ModelPart { path, gguf, file } in parts {
        for tensor in &gguf.tensors {
            let (mut matrix, mut range) = (tensor.matrix(), tensor.range.clone());
            if arch::has_row_per_token(&tensor.name) && used_rows < matrix.0 && used_rows > 0 {
                // Rows are stored one after the other, each in the same number of bytes.
                range.end = range.start + range.len() / matrix.0 * used_rows;
                matrix.0 = used_rows;
            }
            let mut source = Arc::clone(file);
            if let Some(packing) = tensor.packing {
                let bytes: &[u8] = (**file).as_ref();
                let unpacked = packing.unpack(&tensor.name, &bytes[range]);
                let unpacked = unpacked.map_err(|problem| LoadError::gguf(path, problem))?;
                range = 0..unpacked.len();
                source = Arc::new(unpacked);
            }
            let weight = Weight::new(tensor.name.clone(), tensor.dtype, matrix, source, range);
            let pushed = weight.and_then(|weight| weights.push(weight));
            pushed.map_err(|problem| LoadError::Weights { path: path.clone(), problem })?;
        }
    }
    Ok(weights)
}

/// The template with the special tokens that the file names.
fn chat(
    gguf: &Gguf,
    tokenizer: &Tokenizer,
    template: Option<&str>,
) -> Result<Result<ChatTemplate, ChatError>, crate::gguf::GgufProblem> {
    let Some(template) = template else { return Ok(Err(ChatError::NoTemplate)) };
    let token = |key: &str| -> Result<Option<String>, crate::gguf::GgufProblem> {
        let id = gguf.metadata.opt_unsigned(key)?;
        Ok(id.and_then(|id| tokenizer.token(u32::try_from(id).ok()?)))
    };
    let special = SpecialTokens {
        bos_token: token("tokenizer.ggml.bos_token_id")?,
        eos_token: token("tokenizer.ggml.eos_token_id")?,
        unk_token: token("tokenizer.ggml.unknown_token_id")?,
        pad_token: token("tokenizer.ggml.padding_token_id")?,
    };
    let tools = gguf.metadata.opt_string(TOOLS_TEMPLATE)?;
    Ok(ChatTemplate::new(template, special).map(|chat| match tools {
        Some(tools) => chat.with_tools(tools),
        None => chat,
    }))
}

fn facts(
    gguf: &Gguf,
    architecture: &dyn Architecture,
    file_bytes: usize,
) -> Result<ModelFacts, crate::gguf::GgufProblem> {
    let (meta, sizes) = (&gguf.metadata, architecture.sizes());
    let own_name = meta.string("general.architecture")?;
    let embedding = architecture.text_head().map(|head| EmbeddingFacts {
        shortest: shortest(own_name, head.pooling, sizes.width),
        width: sizes.width,
        max_tokens: sizes.context_tokens,
        pooling: head.pooling,
        pooling_note: None,
        normalised: head.normalise,
        prompt: String::new(),
    });
    let elements = |dims: &[usize]| dims.iter().map(|d| *d as u64).product::<u64>();
    Ok(ModelFacts {
        task: if embedding.is_some() { Task::Embed } else { Task::Generate },
        architecture: own_name.to_owned(),
        name: meta.opt_string("general.name")?.map(str::to_owned),
        parameters: gguf.tensors.iter().map(|tensor| elements(&tensor.dims)).sum(),
        context_tokens: sizes.context_tokens,
        vocabulary: sizes.vocabulary,
        layers: sizes.layers,
        kv_heads: sizes.kv_heads,
        head_dim: sizes.head_dim,
        file_bytes: file_bytes as u64,
        embedding,
        classification: None,
        chat_template: meta.opt_string("tokenizer.chat_template")?.map(str::to_owned),
        warnings: Vec::new(),
    })
}

/// Some converters pad the embedding, so more rows than tokens are fine. Fewer rows are not.
fn check_vocabulary(tokenizer: &Tokenizer, facts: &ModelFacts) -> Result<(), crate::gguf::GgufProblem> {
    if tokenizer.len() <= facts.vocabulary {
        return Ok(());
    }
    let why = format!("{} tokens for {} rows of tensor token_embd.weight", tokenizer.len(), facts.vocabulary);
    Err(crate::gguf::GgufProblem::BadValue { key: "tokenizer.ggml.tokens".to_owned(), why })
}

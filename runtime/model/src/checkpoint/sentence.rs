//! The files of sentence-transformers beside a transformer: the modules that follow it, how rows are pooled,
//! the default prompt, and the longest text.

use super::{CheckpointFiles, CheckpointProblem, TOKENIZER_CONFIG};
use crate::error::LoadError;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use trustformers_plan::Pooling;

const MODULES: &str = "modules.json";
const SENTENCE: &str = "sentence_bert_config.json";
const PROMPTS: &str = "config_sentence_transformers.json";

/// How the rows of a text become one vector, and how much of a text is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sentence {
    pub(crate) pooling: Pooling,
    /// What the answer should say about the pooling, where the checkpoint says nothing.
    pub(crate) note: Option<String>,
    pub(crate) normalised: bool,
    /// Tokens of the longest text, its special tokens included; `None` where only the positions bound it.
    pub(crate) max_tokens: Option<usize>,
    /// Whether texts are lower-cased before the tokenizer reads them.
    pub(crate) lowercase: bool,
    /// The default prompt; empty where there is none.
    pub(crate) prompt: String,
}

/// Prompts by name, and the name of the one that is put before every text.
#[derive(Deserialize, Default)]
#[serde(default)]
struct PromptConfig {
    prompts: BTreeMap<String, String>,
    default_prompt_name: Option<String>,
}

/// A module of sentence-transformers.
#[derive(Debug, Deserialize)]
pub(crate) struct Module {
    /// Its folder below the checkpoint's.
    #[serde(default)]
    pub(crate) path: String,
    #[serde(rename = "type")]
    kind: String,
}

impl Module {
    /// The name of its class.
    pub(crate) fn name(&self) -> &str {
        self.kind.rsplit('.').next().unwrap_or_default()
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct SentenceConfig {
    max_seq_length: Option<usize>,
    do_lower_case: bool,
}

#[derive(Deserialize)]
struct TokenizerConfig {
    /// A float or `Infinity` where there is no limit: the library writes 1e30.
    model_max_length: Option<Value>,
}

/// Modes of pooling: one flag each, or one name in newer files.
#[derive(Deserialize, Default)]
#[serde(default)]
#[expect(clippy::struct_excessive_bools, reason = "the file has these flags")]
struct PoolingConfig {
    pooling_mode: Option<String>,
    pooling_mode_cls_token: bool,
    pooling_mode_mean_tokens: bool,
    pooling_mode_max_tokens: bool,
    pooling_mode_mean_sqrt_len_tokens: bool,
    pooling_mode_weightedmean_tokens: bool,
    pooling_mode_lasttoken: bool,
    /// Whether the rows of a prompt are pooled as those of the text.
    include_prompt: Option<bool>,
}

impl PoolingConfig {
    fn pooling(&self) -> Result<Pooling, CheckpointProblem> {
        let flags = [
            ("cls", self.pooling_mode_cls_token),
            ("mean", self.pooling_mode_mean_tokens),
            ("max", self.pooling_mode_max_tokens),
            ("mean_sqrt_len_tokens", self.pooling_mode_mean_sqrt_len_tokens),
            ("weightedmean", self.pooling_mode_weightedmean_tokens),
            ("lasttoken", self.pooling_mode_lasttoken),
        ];
        let set: Vec<&str> = flags.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
        let mode = match (&self.pooling_mode, set.as_slice()) {
            (Some(mode), _) => mode.as_str(),
            (None, [mode]) => mode,
            (None, []) => "none",
            (None, several) => {
                let found = several.join(" and ");
                return Err(CheckpointProblem::unsupported("pooling_mode", found, "one of them"));
            }
        };
        match mode {
            "mean" => Ok(Pooling::Mean),
            "cls" => Ok(Pooling::Cls),
            "max" => Ok(Pooling::Max),
            "lasttoken" => Ok(Pooling::Last),
            other => {
                let supported = "mean, cls, max, lasttoken";
                Err(CheckpointProblem::unsupported("pooling_mode", format!("{other:?}"), supported))
            }
        }
    }
}

impl Sentence {
    /// Reads what there is of these files.
    pub(crate) fn read(files: &CheckpointFiles) -> Result<Self, LoadError> {
        let modules = Self::modules(files)?;
        let wrong = |problem| files.wrong(MODULES, problem);
        let prompt = read_prompt(files)?;
        let (mut pooling, mut normalised) = (None, false);
        for (place, module) in modules.iter().enumerate() {
            let name = module.name();
            match (place, name) {
                (0, "Transformer") => {}
                (1, "Pooling") => pooling = Some(read_pooling(files, &module.path, &prompt)?),
                (2, "Normalize") => normalised = true,
                _ => {
                    let found = format!("{name} at place {place}");
                    let supported = "Transformer, then Pooling, then Normalize";
                    return Err(wrong(CheckpointProblem::unsupported("type", found, supported)));
                }
            }
        }
        let note = pooling.is_none().then(|| {
            "the checkpoint has no pooling configuration: the mean over the text's tokens is used".to_owned()
        });
        let config: SentenceConfig = files.optional_json(SENTENCE)?.unwrap_or_default();
        let max_tokens = config.max_tokens(files)?;
        let pooling = pooling.unwrap_or(Pooling::Mean);
        Ok(Self { pooling, note, normalised, max_tokens, lowercase: config.do_lower_case, prompt })
    }
}

impl Sentence {
    /// The modules in their order; none where there is no such file.
    pub(crate) fn modules(files: &CheckpointFiles) -> Result<Vec<Module>, LoadError> {
        Ok(files.optional_json(MODULES)?.unwrap_or_default())
    }

    /// The prompt that is put before every text; empty where there is none.
    pub(crate) fn default_prompt(files: &CheckpointFiles) -> Result<String, LoadError> {
        read_prompt(files)
    }

    /// [`Self::read`] beside a decoder, whose rows are pooled in no way by default.
    pub(crate) fn of_decoder(files: &CheckpointFiles) -> Result<Self, LoadError> {
        let sentence = Self::read(files)?;
        if sentence.note.is_some() {
            let (found, supported) = ("no Pooling", "Transformer, then Pooling, then Normalize");
            return Err(files.wrong(MODULES, CheckpointProblem::unsupported("type", found, supported)));
        }
        Ok(sentence)
    }

    /// What there is of these files beside a classifier: it reads the first row of a text, and has no prompt.
    pub(crate) fn of_classifier(files: &CheckpointFiles) -> Result<Self, LoadError> {
        let config: SentenceConfig = files.optional_json(SENTENCE)?.unwrap_or_default();
        Ok(Self {
            pooling: Pooling::Cls,
            note: None,
            normalised: false,
            max_tokens: config.max_tokens(files)?,
            lowercase: config.do_lower_case,
            prompt: String::new(),
        })
    }
}

impl Sentence {
    /// What there is of these files beside a model that labels tokens. It reads texts as they are: labels
    /// have places in them.
    pub(crate) fn of_token_classifier(files: &CheckpointFiles) -> Result<Self, LoadError> {
        let sentence = Self { pooling: Pooling::Mean, ..Self::of_classifier(files)? };
        if sentence.lowercase {
            let supported = "false, of models that label tokens";
            let problem = CheckpointProblem::unsupported("do_lower_case", "true", supported);
            return Err(files.wrong(SENTENCE, problem));
        }
        Ok(sentence)
    }
}

impl SentenceConfig {
    fn max_tokens(&self, files: &CheckpointFiles) -> Result<Option<usize>, LoadError> {
        match self.max_seq_length {
            Some(tokens) => Ok(Some(tokens)),
            None => tokenizer_limit(files),
        }
    }
}

/// The prompt that the library puts before every text for which the caller names none.
fn read_prompt(files: &CheckpointFiles) -> Result<String, LoadError> {
    let PromptConfig { mut prompts, default_prompt_name } = files.optional_json(PROMPTS)?.unwrap_or_default();
    let Some(name) = default_prompt_name else { return Ok(String::new()) };
    prompts.remove(&name).ok_or_else(|| {
        let known: Vec<&str> = prompts.keys().map(String::as_str).collect();
        let why = format!("{name:?} is not a name in prompts, which has {known:?}");
        files.wrong(PROMPTS, CheckpointProblem::Malformed { key: "default_prompt_name", why })
    })
}

fn read_pooling(files: &CheckpointFiles, folder: &str, prompt: &str) -> Result<Pooling, LoadError> {
    let name = format!("{folder}/config.json");
    let config: Option<PoolingConfig> = files.optional_json(&name)?;
    let config = config.ok_or_else(|| files.wrong(&name, CheckpointProblem::Missing))?;
    if !prompt.is_empty() && config.include_prompt == Some(false) {
        let supported = "true where config_sentence_transformers.json names a default prompt";
        let problem = CheckpointProblem::unsupported("include_prompt", "false", supported);
        return Err(files.wrong(&name, problem));
    }
    config.pooling().map_err(|problem| files.wrong(&name, problem))
}

/// `model_max_length` where it is a limit at all.
fn tokenizer_limit(files: &CheckpointFiles) -> Result<Option<usize>, LoadError> {
    let config: Option<TokenizerConfig> = files.optional_json(TOKENIZER_CONFIG)?;
    let limit = config.and_then(|config| config.model_max_length).and_then(|limit| limit.as_f64());
    // Below 2³¹ a float with a whole value is that integer exactly.
    Ok(limit.filter(|limit| (1.0..2_147_483_648.0).contains(limit)).map(|limit| limit as usize))
}

//! What sentence-transformers keeps beside a transformer: the modules that follow it, how rows are pooled, and how
//! long a text may be.

use super::{CheckpointFiles, CheckpointProblem, TOKENIZER_CONFIG};
use crate::error::LoadError;
use serde::Deserialize;
use trustformers_plan::Pooling;

const MODULES: &str = "modules.json";
const SENTENCE: &str = "sentence_bert_config.json";

/// How the rows of a text become one vector, and how much of a text is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sentence {
    pub(crate) pooling: Pooling,
    /// What the answer should say about the pooling, where the checkpoint says nothing.
    pub(crate) note: Option<String>,
    pub(crate) normalised: bool,
    /// Tokens of the longest text, its special tokens included; `None` where only the positions bound it.
    pub(crate) max_tokens: Option<usize>,
    /// Whether texts are lower-cased before the tokenizer sees them.
    pub(crate) lowercase: bool,
}

#[derive(Deserialize)]
struct Module {
    #[serde(default)]
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct SentenceConfig {
    max_seq_length: Option<usize>,
    do_lower_case: bool,
}

#[derive(Deserialize)]
struct TokenizerConfig {
    /// A float where no limit is meant: the library writes 1e30.
    model_max_length: Option<f64>,
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
            other => {
                Err(CheckpointProblem::unsupported("pooling_mode", format!("{other:?}"), "mean, cls, max"))
            }
        }
    }
}

impl Sentence {
    /// Reads what there is of these files.
    pub(crate) fn read(files: &CheckpointFiles) -> Result<Self, LoadError> {
        let modules: Option<Vec<Module>> = files.optional_json(MODULES)?;
        let wrong = |problem| files.wrong(MODULES, problem);
        let (mut pooling, mut normalised) = (None, false);
        for (place, module) in modules.iter().flatten().enumerate() {
            let name = module.kind.rsplit('.').next().unwrap_or_default();
            match (place, name) {
                (0, "Transformer") => {}
                (1, "Pooling") => pooling = Some(read_pooling(files, &module.path)?),
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
        let max_tokens = match config.max_seq_length {
            Some(tokens) => Some(tokens),
            None => tokenizer_limit(files)?,
        };
        let pooling = pooling.unwrap_or(Pooling::Mean);
        Ok(Self { pooling, note, normalised, max_tokens, lowercase: config.do_lower_case })
    }
}

fn read_pooling(files: &CheckpointFiles, folder: &str) -> Result<Pooling, LoadError> {
    let name = format!("{folder}/config.json");
    let config: Option<PoolingConfig> = files.optional_json(&name)?;
    let config = config.ok_or_else(|| files.wrong(&name, CheckpointProblem::Missing))?;
    config.pooling().map_err(|problem| files.wrong(&name, problem))
}

/// `model_max_length` where it is a limit at all.
fn tokenizer_limit(files: &CheckpointFiles) -> Result<Option<usize>, LoadError> {
    let config: Option<TokenizerConfig> = files.optional_json(TOKENIZER_CONFIG)?;
    let limit = config.and_then(|config| config.model_max_length);
    // Below 2³¹ a float with a whole value is that integer exactly.
    Ok(limit.filter(|limit| (1.0..2_147_483_648.0).contains(limit)).map(|limit| limit as usize))
}

//! The folders of seeded models: their files, and the modules of sentence-transformers.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Every file's bytes by its path below the folder.
pub(super) type Files = BTreeMap<&'static str, Vec<u8>>;

/// Writes all files into `folder`, which must exist.
pub(super) fn write(files: &Files, folder: &Path) -> std::io::Result<()> {
    for (name, content) in files {
        let path = folder.join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(path, content)?;
    }
    Ok(())
}

/// The bytes of a file of JSON.
pub(super) fn json_file(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// A module of `modules.json`: its folder and the last part of its class.
#[derive(Debug, Clone, Copy)]
pub(super) struct SentenceModule {
    pub(super) path: &'static str,
    pub(super) kind: &'static str,
}

/// The content of `modules.json`: the transformer, and these modules after it.
pub(super) fn modules(after: &[SentenceModule]) -> Value {
    let transformer = SentenceModule { path: "", kind: "Transformer" };
    let modules = std::iter::once(&transformer).chain(after).enumerate().map(|(index, module)| {
        let kind = format!("sentence_transformers.models.{}", module.kind);
        json!({"idx": index, "name": index.to_string(), "path": module.path, "type": kind})
    });
    modules.collect()
}

/// The pooling of a folder.
pub(super) const POOLING: SentenceModule = SentenceModule { path: "1_Pooling", kind: "Pooling" };
/// What divides vectors by their length.
pub(super) const NORMALIZE: SentenceModule = SentenceModule { path: "2_Normalize", kind: "Normalize" };

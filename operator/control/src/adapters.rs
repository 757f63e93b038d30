//! Adapters of a model: checked, and where a pod finds their files.

use std::collections::BTreeSet;

use trustformers_crds::{Adapter, AdapterSource, InferenceModelSpec, Source};
use trustformers_proto::Task;
use trustformers_proto::pod_config::PodAdapter;

use crate::validate::{Mount, SourceError, ValidateError, mount};

/// The folder below which adapters are mounted, each under its name.
const ADAPTERS_DIR: &str = "/adapters";

/// An adapter whose source can be honoured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidatedAdapter {
    /// The name that callers use.
    pub name: String,
    /// The source as written.
    pub source: AdapterSource,
    /// Where its files are. The cache of one that is fetched is the model's.
    pub mount: Mount,
}

impl ValidatedAdapter {
    /// Whether a pod fetches it.
    #[must_use]
    pub fn is_fetched(&self) -> bool {
        matches!(self.mount, Mount::Fetched(_))
    }

    /// Where its volume is mounted, if it has one.
    #[must_use]
    pub fn mount_path(&self) -> Option<String> {
        (!self.is_fetched()).then(|| format!("{ADAPTERS_DIR}/{}", self.name))
    }

    /// What a pod is told of it.
    #[must_use]
    pub fn of_pod(&self) -> PodAdapter {
        let AdapterSource { uri, revision, sha256 } = &self.source;
        let path = match (&self.mount, self.mount_path()) {
            (Mount::Claim { path, .. }, Some(folder)) if !path.is_empty() => format!("{folder}/{path}"),
            (_, Some(folder)) => folder,
            (_, None) => uri.clone(),
        };
        PodAdapter { name: self.name.clone(), path, revision: revision.clone(), sha256: sha256.clone() }
    }
}

/// Checks the adapters of a spec.
///
/// # Errors
/// A name that occurs twice or cannot be used, a source that cannot be honoured, or a model that generates no
/// text.
pub(crate) fn validate(spec: &InferenceModelSpec) -> Result<Vec<ValidatedAdapter>, ValidateError> {
    let adapters = &spec.runtime.adapters;
    if let (Some(first), Some(task)) = (adapters.first(), spec.task)
        && task != Task::Generate
    {
        let why = format!("a model with task {task} generates no text, and adapters are for models that do");
        return Err(ValidateError::Adapter { name: first.name.clone(), why: why + "; remove it" });
    }
    let mut names = BTreeSet::new();
    let mut check = |adapter: &Adapter| {
        let Adapter { name, source } = adapter;
        let wrong = |why: String| ValidateError::Adapter { name: name.clone(), why };
        if !names.insert(name.clone()) {
            return Err(wrong("the name occurs twice; remove one of them".to_owned()));
        }
        // The name is part of a path and of the names of models.
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.starts_with('.') || !name.chars().all(is_plain) {
            return Err(wrong("a name has letters, digits, '-', '_' and '.' alone".to_owned()));
        }
        if source.uri.starts_with("https://") {
            return Err(wrong("source.uri: https:// names one file, and an adapter has two".to_owned()));
        }
        let mount =
            mount(&plain_source(source)).map_err(|error: SourceError| wrong(format!("source.{error}")))?;
        Ok(ValidatedAdapter { name: name.clone(), source: source.clone(), mount })
    };
    adapters.iter().map(&mut check).collect()
}

/// The source of an adapter as that of a model without files to pick.
fn plain_source(source: &AdapterSource) -> Source {
    let AdapterSource { uri, revision, sha256 } = source.clone();
    Source { uri, files: Vec::new(), sha256, revision, oci: None, secret_ref: None, cache: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate::CacheVolume;
    use crate::validate::tests::{model, valid};

    fn adapters(list: &str) -> String {
        format!("{{source: {{uri: 'oci://x'}}, runtime: {{adapters: {list}}}}}")
    }

    #[test]
    fn adapters_have_a_folder_each_or_are_fetched() {
        let spec = adapters(
            "[{name: sql, source: {uri: 'oci://r/sql:v1', sha256: ab}}, {name: tone, source: {uri: 'pvc://w/a/b'}}, \
             {name: far, source: {uri: 'hf://o/n', revision: v1}}]",
        );
        let found = valid("chat", &spec).adapters;
        assert_eq!(found[0].mount, Mount::Image { reference: "r/sql:v1".to_owned() });
        assert_eq!(found[2].mount, Mount::Fetched(CacheVolume::EmptyDir { size_limit: None }));
        let told: Vec<PodAdapter> = found.iter().map(ValidatedAdapter::of_pod).collect();
        let paths: Vec<_> = told.iter().map(|one| one.path.as_str()).collect();
        assert_eq!(paths, ["/adapters/sql", "/adapters/tone/a/b", "hf://o/n"]);
        assert_eq!((told[0].sha256.as_deref(), told[2].revision.as_deref()), (Some("ab"), Some("v1")));
    }

    #[test]
    fn adapters_that_cannot_be_honoured_are_refused_by_name() {
        let source = "source: {uri: 'oci://x'}";
        for (list, says) in [
            (format!("[{{name: a, {source}}}, {{name: a, {source}}}]"), "occurs twice"),
            (format!("[{{name: 'a:b', {source}}}]"), "letters, digits"),
            (format!("[{{name: '..', {source}}}]"), "letters, digits"),
            ("[{name: a, source: {uri: 'ftp://x'}}]".to_owned(), "source.uri: \"ftp://x\" is not supported"),
            ("[{name: a, source: {uri: 'https://h/f'}}]".to_owned(), "an adapter has two"),
            (
                "[{name: a, source: {uri: 's3://b/k', revision: v1}}]".to_owned(),
                "source.revision: only hf://",
            ),
        ] {
            let error = crate::validate::validate(&model("chat", &adapters(&list))).unwrap_err().to_string();
            assert!(error.starts_with("spec.runtime.adapters: ") && error.contains(says), "{error}");
        }
        let embeds = format!(
            "{{task: embed, source: {{uri: 'oci://x'}}, runtime: {{adapters: [{{name: a, {source}}}]}}}}"
        );
        let error = crate::validate::validate(&model("chat", &embeds)).unwrap_err().to_string();
        assert!(error.contains("task embed generates no text"), "{error}");
    }
}

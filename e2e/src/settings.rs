//! Where the scenarios find the cluster, the tools and the images: three environment variables, all required,
//! so that a run never reaches a cluster that happens to be configured on this machine.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The settings of a run of the scenarios.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Credentials of the test cluster's administrator.
    pub kubeconfig: PathBuf,
    /// Folder with helm and kubectl.
    pub bin: PathBuf,
    /// Tag of the images that the nodes already hold.
    pub image_tag: String,
    /// `${XDG_CACHE_HOME:-$HOME/.cache}/trustformers`: models, images and the report live below it.
    pub cache: PathBuf,
    /// The checkout's root.
    pub repository: PathBuf,
}

impl Settings {
    /// Reads `TRUSTFORMERS_E2E_KUBECONFIG`, `TRUSTFORMERS_E2E_BIN` and `TRUSTFORMERS_E2E_IMAGE_TAG`.
    ///
    /// # Errors
    /// Names the variable that is missing, or the file that a variable names and that does not exist.
    pub fn from_env() -> Result<Self> {
        Self::read(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let required = |name: &str, what: &str| {
            variable(name).with_context(|| {
                format!("{name} is not set: it must hold {what}; `make test` sets it after `make cluster-up`")
            })
        };
        let kubeconfig =
            required("TRUSTFORMERS_E2E_KUBECONFIG", "the path of the test cluster's kubeconfig")?;
        let bin = required("TRUSTFORMERS_E2E_BIN", "the folder with helm and kubectl")?;
        let image_tag = required("TRUSTFORMERS_E2E_IMAGE_TAG", "the tag of the images on the nodes")?;
        let cache = match variable("XDG_CACHE_HOME") {
            Some(folder) => PathBuf::from(folder),
            None => {
                PathBuf::from(required("HOME", "the home folder, below which the cache lies")?).join(".cache")
            }
        };
        let repository =
            Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the e2e crate has no parent")?;
        let settings = Self {
            kubeconfig: kubeconfig.into(),
            bin: bin.into(),
            image_tag,
            cache: cache.join("trustformers"),
            repository: repository.to_path_buf(),
        };
        ensure!(
            settings.kubeconfig.is_file(),
            "TRUSTFORMERS_E2E_KUBECONFIG names {}, which is no file: run `make cluster-up`",
            settings.kubeconfig.display()
        );
        for tool in ["helm", "kubectl"] {
            let path = settings.bin.join(tool);
            ensure!(path.is_file(), "TRUSTFORMERS_E2E_BIN: {} is missing", path.display());
        }
        Ok(settings)
    }

    /// Folder of the figures that `make report` prints.
    #[must_use]
    pub fn report(&self) -> PathBuf {
        self.cache.join("report")
    }

    /// The chart that is installed.
    #[must_use]
    pub fn chart(&self) -> PathBuf {
        self.repository.join("charts/trustformers")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_variable_is_named_with_the_way_to_set_it() {
        let error = Settings::read(|_| None).unwrap_err().to_string();
        assert!(
            error.contains("TRUSTFORMERS_E2E_KUBECONFIG") && error.contains("make cluster-up"),
            "{error}"
        );
    }

    #[test]
    fn a_kubeconfig_that_is_not_there_is_named() {
        let error = Settings::read(|name| match name {
            "TRUSTFORMERS_E2E_KUBECONFIG" => Some("/nonexistent/admin.kubeconfig".to_owned()),
            _ => Some("/nonexistent".to_owned()),
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("/nonexistent/admin.kubeconfig"), "{error}");
    }
}

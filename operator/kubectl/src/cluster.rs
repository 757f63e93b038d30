//! The connection to the cluster, and what can go wrong with it.

use std::future::Future;
use std::io;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::core::NamespaceResourceScope;
use kube::runtime::watcher;
use kube::{Api, Client, Config, Resource};
use tokio::time::timeout;
use trustformers_crds::InferenceModel;

use crate::args::Target;

/// Longest time of one request. The API server itself gives up on a request after 60 s; a person has given up
/// before.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The kubeconfig cannot be used.
    #[error("the kubeconfig cannot be used: {0}")]
    Kubeconfig(#[from] KubeconfigError),
    /// No cluster is configured.
    #[error("no cluster is configured: {0}; name a kubeconfig with --kubeconfig or $KUBECONFIG")]
    NoCluster(Box<kube::config::InferConfigError>),
    /// A request failed.
    #[error("{what}: {}", refusal(cause))]
    Request {
        /// What was requested.
        what: String,
        /// Why it failed.
        cause: Box<kube::Error>,
    },
    /// The API server did not answer.
    #[error("{what}: the API server did not answer within {} s", REQUEST_LIMIT.as_secs())]
    NoAnswer {
        /// What was requested.
        what: String,
    },
    /// A watch failed.
    #[error("{what}: the watch failed: {cause}")]
    Watch {
        /// What was watched.
        what: String,
        /// Why it failed.
        cause: Box<watcher::Error>,
    },
    /// A command to a rollout that does not apply.
    #[error(transparent)]
    Rollout(#[from] crate::rollout::Refusal),
    /// There is nothing to show.
    #[error("{0}")]
    Nothing(String),
    /// The stored sums of a test cannot be read.
    #[error(transparent)]
    Sums(#[from] crate::report::sums::UnreadableSums),
    /// A file cannot be written.
    #[error("{path}: {cause}")]
    File {
        /// The file.
        path: String,
        /// Why.
        cause: io::Error,
    },
    /// Standard output cannot be written.
    #[error("standard output: {0}")]
    Output(io::Error),
    /// A result cannot be written as JSON.
    #[error("the result cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// The API server's own sentence, where it gave one, or a hint where the answer is not understood.
fn refusal(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => match status.code {
            403 => {
                format!("{}; `kubectl trustformers doctor` lists the rights that are needed", status.message)
            }
            404 => format!("{}; `kubectl trustformers status` lists the models", status.message),
            _ => status.message.clone(),
        },
        kube::Error::SerdeError(cause) => format!(
            "the object is not as version {} has it ({cause}): use the plugin of the installed version",
            env!("CARGO_PKG_VERSION")
        ),
        other => other.to_string(),
    }
}

/// A cluster, and the namespace of the command.
#[derive(Clone)]
pub struct Cluster {
    /// A client with the rights of the person.
    pub client: Client,
    /// The namespace.
    pub namespace: String,
}

impl Cluster {
    /// Connects to the cluster that was named.
    ///
    /// # Errors
    /// When no cluster is configured, or its configuration cannot be used.
    pub async fn connect(target: &Target) -> Result<Self, CommandError> {
        let options = KubeConfigOptions { context: target.context.clone(), ..KubeConfigOptions::default() };
        let config = match (&target.kubeconfig, &target.context) {
            (Some(path), _) => Config::from_custom_kubeconfig(Kubeconfig::read_from(path)?, &options).await?,
            (None, Some(_)) => Config::from_kubeconfig(&options).await?,
            (None, None) => {
                Config::infer().await.map_err(|error| CommandError::NoCluster(Box::new(error)))?
            }
        };
        let namespace = target.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|cause| CommandError::Request {
            what: "the cluster's configuration".to_owned(),
            cause: Box::new(cause),
        })?;
        Ok(Self { client, namespace })
    }

    /// The API of a kind in the command's namespace.
    #[must_use]
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Reads a model.
    ///
    /// # Errors
    /// When there is none of the name, or the request fails.
    pub async fn model(&self, name: &str) -> Result<InferenceModel, CommandError> {
        let what = format!("InferenceModel {name} in namespace {}", self.namespace);
        answered(&what, self.api::<InferenceModel>().get(name)).await
    }
}

/// The error of a watch, unless it is tried again by itself: the API server refused the request, and it will
/// refuse the next one.
///
/// # Errors
/// When the API server refused the request.
pub fn refused_watch(what: &str, cause: watcher::Error) -> Result<(), CommandError> {
    let code = match &cause {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code,
        _ => 0,
    };
    if matches!(code, 400 | 401 | 403 | 404) {
        return Err(CommandError::Watch { what: what.to_owned(), cause: Box::new(cause) });
    }
    Ok(())
}

/// The answer to a request that must come in time.
///
/// # Errors
/// When the request fails, or nothing comes.
pub async fn answered<T>(
    what: &str,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, CommandError> {
    match timeout(REQUEST_LIMIT, request).await {
        Ok(answer) => {
            answer.map_err(|cause| CommandError::Request { what: what.to_owned(), cause: Box::new(cause) })
        }
        Err(_) => Err(CommandError::NoAnswer { what: what.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    #[test]
    fn a_watch_goes_on_unless_it_is_refused() {
        let failed = |code| {
            let status = Status { code, ..Status::failure("no", "Reason") };
            watcher::Error::InitialListFailed(kube::Error::Api(Box::new(status)))
        };
        assert!(refused_watch("pods", failed(403)).is_err());
        for passing in [failed(410), failed(429), failed(503), watcher::Error::NoResourceVersion] {
            assert!(refused_watch("pods", passing).is_ok());
        }
    }

    fn refused(code: u16, message: &str) -> String {
        let status = Status { code, ..Status::failure(message, "Forbidden") };
        let cause = Box::new(kube::Error::Api(Box::new(status)));
        CommandError::Request { what: "InferenceModel chat".to_owned(), cause }.to_string()
    }

    #[test]
    fn a_refusal_has_the_sentence_of_the_api_server_and_the_next_step() {
        assert_eq!(
            refused(403, "pods is forbidden"),
            "InferenceModel chat: pods is forbidden; `kubectl trustformers doctor` lists the rights that are needed"
        );
        assert!(refused(404, "not found").ends_with("`kubectl trustformers status` lists the models"));
        assert_eq!(refused(409, "conflict"), "InferenceModel chat: conflict");
    }
}

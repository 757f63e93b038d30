//! Requests to the admin port of pods: load, swap and unload a version.
//!
//! Each is made again by the next reconcile until the pod's report shows that it is done, so that an answer
//! that does not come within seconds is none that anybody waits for.

use std::net::IpAddr;
use std::time::Duration;

use tokio::time::timeout;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};
use trustformers_control::pods::PodView;
use trustformers_proto::v1::model_service_client::ModelServiceClient;
use trustformers_proto::v1::{LoadModelRequest, SwapModelRequest, UnloadModelRequest};

/// Limit on one attempt to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A load answers when it is complete and an unload when its last answer has ended; neither is waited for.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// Who the operator is for pods: the ServiceAccount that it runs with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The account's namespace.
    pub namespace: String,
    /// The account's name.
    pub account: String,
}

impl Identity {
    /// The account as tokens name it: `system:serviceaccount:NAMESPACE:NAME`.
    #[must_use]
    pub fn subject(&self) -> String {
        format!("system:serviceaccount:{}:{}", self.namespace, self.account)
    }
}

/// What a pod is asked for, complete.
#[derive(Debug, Clone, PartialEq)]
pub enum AdminRequest {
    /// Load a version.
    Load(Box<LoadModelRequest>),
    /// Let another version answer.
    Swap(SwapModelRequest),
    /// Unload a version.
    Unload(UnloadModelRequest),
}

/// Why a pod was not asked, or refused.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The pod has no address that can be connected to.
    #[error("it has no address")]
    NoAddress,
    /// The pod refused, or could not be reached.
    #[error("{} ({:?})", .0.message(), .0.code())]
    Refused(Box<Status>),
}

impl AdminError {
    /// Whether the pod did not accept the operator's token.
    #[must_use]
    pub fn is_about_identity(&self) -> bool {
        matches!(self, Self::Refused(status) if status.code() == Code::Unauthenticated)
    }
}

/// The URI of a port of a pod.
#[must_use]
pub fn uri(address: IpAddr, port: u16) -> Option<Uri> {
    let host = match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    format!("http://{host}:{port}").parse().ok()
}

/// Asks a pod at a port, with the operator's token for the pods of its namespace.
///
/// # Errors
/// When it refused within [`ANSWER_LIMIT`], or was not reached.
pub async fn ask(
    token: MetadataValue<Ascii>,
    pod: &PodView,
    port: u16,
    request: AdminRequest,
) -> Result<(), AdminError> {
    let address = pod.address.as_deref().and_then(|address| address.parse().ok());
    let uri = address.and_then(|address| uri(address, port)).ok_or(AdminError::NoAddress)?;
    let channel = Endpoint::from(uri).connect_timeout(CONNECT_TIMEOUT).connect_lazy();
    match timeout(ANSWER_LIMIT, call(channel, token, request)).await {
        Ok(answer) => answer.map_err(|status| AdminError::Refused(Box::new(status))),
        // The pod goes on.
        Err(_elapsed) => Ok(()),
    }
}

async fn call(channel: Channel, token: MetadataValue<Ascii>, request: AdminRequest) -> Result<(), Status> {
    let authorize = move |mut request: Request<()>| {
        request.metadata_mut().insert("authorization", token.clone());
        Ok::<_, Status>(request)
    };
    let mut client = ModelServiceClient::with_interceptor(channel, authorize);
    match request {
        AdminRequest::Load(request) => client.load_model(*request).await.map(drop),
        AdminRequest::Swap(request) => client.swap_model(request).await.map(drop),
        AdminRequest::Unload(request) => client.unload_model(request).await.map(drop),
    }
}

//! A mock API server for tests. It refuses every request that the operator is not permitted to make, so that
//! a missing permission fails without a cluster.

use std::convert::Infallible;

use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::BodyExt;
use kube::Client;
use kube::client::Body;
use serde_json::Value;
use tower::service_fn;

use crate::cluster_keys::{DISCOVERY_PATH, KEYS_PATH};
use crate::permissions::{at_home, everywhere};

/// Namespaces that the tests use for the operator itself.
const HOME: &[&str] = &["sys", "trustformers-system"];

/// One request to the mock API server.
#[derive(Debug, Clone)]
pub(crate) struct MockRequest {
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) body: Value,
}

/// A client of an API server that answers by `answer`.
pub(crate) fn mock_client(
    answer: impl Fn(MockRequest) -> (StatusCode, Value) + Clone + Send + Sync + 'static,
) -> Client {
    let service = service_fn(move |request: Request<Body>| {
        let answer = answer.clone();
        async move {
            let request = read(request).await;
            let (status, body) = answer(request);
            Ok::<_, Infallible>(respond(status, &body))
        }
    });
    Client::new(service, "default")
}

/// The permissions that a request needs, as `group/resource verb`.
pub(crate) fn needed(request: &MockRequest) -> Vec<String> {
    let access = Access::of(&request.method, &request.uri);
    access.verbs.iter().map(|verb| format!("{}/{} {verb}", access.group, access.resource)).collect()
}

/// Reads a request and checks that it is permitted.
pub(crate) async fn read(request: Request<Body>) -> MockRequest {
    let (parts, body) = request.into_parts();
    let access = Access::of(&parts.method, &parts.uri);
    assert!(access.is_permitted(), "{} {} is not permitted: {access:?}", parts.method, parts.uri);
    let bytes = body.collect().await.unwrap().to_bytes();
    let body = if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).unwrap() };
    MockRequest { method: parts.method, uri: parts.uri, body }
}

/// A response with this body.
pub(crate) fn respond(status: StatusCode, body: &Value) -> Response<Body> {
    let body = Body::from(serde_json::to_vec(body).unwrap());
    Response::builder().status(status).body(body).unwrap()
}

/// What a request needs permission for.
#[derive(Debug, PartialEq, Eq)]
struct Access {
    group: String,
    resource: String,
    namespace: Option<String>,
    verbs: Vec<&'static str>,
}

impl Access {
    fn of(method: &Method, uri: &Uri) -> Self {
        if [KEYS_PATH, DISCOVERY_PATH].contains(&uri.path()) {
            // A role of Kubernetes grants them to every account.
            return Self {
                group: String::new(),
                resource: String::new(),
                namespace: None,
                verbs: Vec::new(),
            };
        }
        let mut segments = uri.path().split('/').filter(|one| !one.is_empty());
        let group = match segments.next() {
            Some("api") => String::new(),
            Some("apis") => segments.next().unwrap().to_owned(),
            other => panic!("no path of the API server: {other:?} in {uri}"),
        };
        let mut segments: Vec<&str> = segments.skip(1).collect();
        let mut namespace = None;
        if segments.len() > 2 && segments[0] == "namespaces" {
            namespace = Some(segments[1].to_owned());
            segments.drain(..2);
        }
        let resource = match segments[..] {
            [resource] | [resource, _] => resource.to_owned(),
            [resource, _, subresource] => format!("{resource}/{subresource}"),
            _ => panic!("no path of a resource: {uri}"),
        };
        let query = uri.query().unwrap_or_default();
        let verbs = match *method {
            Method::GET if segments.len() > 1 => vec!["get"],
            Method::GET if query.contains("watch=true") => vec!["watch"],
            Method::GET => vec!["list"],
            Method::POST => vec!["create"],
            Method::PUT => vec!["update"],
            Method::DELETE => vec!["delete"],
            // Server-side apply creates what does not exist.
            Method::PATCH
                if query.contains("fieldManager") && !query.contains("force") && segments.len() == 2 =>
            {
                vec!["create", "patch"]
            }
            Method::PATCH => vec!["patch"],
            _ => panic!("no verb for {method}"),
        };
        Self { group, resource, namespace, verbs }
    }

    fn is_permitted(&self) -> bool {
        let mut permissions = everywhere();
        if self.namespace.as_deref().is_some_and(|namespace| HOME.contains(&namespace)) {
            permissions.extend(at_home());
        }
        let granted: Vec<&str> = permissions
            .into_iter()
            .filter(|one| one.group == self.group && one.resource == self.resource)
            .flat_map(|one| one.verbs)
            .collect();
        self.verbs.iter().all(|verb| granted.contains(verb))
    }
}

#[test]
fn requests_beyond_the_permissions_are_refused() {
    let permitted = |method: Method, uri: &str| Access::of(&method, &uri.parse().unwrap()).is_permitted();
    assert!(permitted(Method::GET, "/apis/apps/v1/deployments?watch=true"));
    assert!(permitted(Method::PATCH, "/api/v1/namespaces/team/pods/p/status"));
    assert!(permitted(
        Method::PUT,
        "/apis/coordination.k8s.io/v1/namespaces/sys/leases/trustformers-operator"
    ));
    assert!(!permitted(
        Method::PUT,
        "/apis/coordination.k8s.io/v1/namespaces/team/leases/trustformers-operator"
    ));
    assert!(!permitted(Method::GET, "/api/v1/namespaces/team/secrets/s"));
    assert!(!permitted(Method::DELETE, "/api/v1/namespaces/team/services/chat"));
    assert!(!permitted(Method::PATCH, "/api/v1/namespaces/team/pods/p"));
}

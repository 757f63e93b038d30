//! Scenarios about pods that wait for gateways.

use kube::runtime::watcher::Event;
use serde_json::json;
use trustformers_control::gate::{GatewayPod, Report, SETTLE};
use trustformers_control::names;

use super::*;
use crate::feed::FeedState;
use crate::reconcile::status::LAUNCH_WAIT;

#[tokio::test(start_paused = true)]
async fn a_model_says_that_its_pods_wait_for_silent_gateways() {
    let server = ScriptedServer::default();
    let (context, mut writers, model) = with_new_model(&server).await;
    let feed = Arc::new(FeedState::new(1));
    feed.set_reachable();
    let uid = "g1".to_owned();
    feed.set_gateway_pods([GatewayPod { uid: uid.clone(), name: "gateway-0".to_owned(), ready: true }]);
    context.feed.set(Arc::clone(&feed)).unwrap();
    tokio::time::advance(SETTLE).await;

    let conditions =
        json!([{"type": "ContainersReady", "status": "True"}, {"type": "Ready", "status": "False"}]);
    let mut warm = pod("p", json!({"podIP": "10.0.0.1", "conditions": conditions}));
    warm.metadata.labels.as_mut().unwrap().insert(names::REVISION_LABEL.to_owned(), revision(SPEC));
    writers.pods.apply_watcher_event(&Event::Apply(warm));
    // Nothing but a reason is new, so the status waits for a short time.
    reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
    tokio::time::advance(LAUNCH_WAIT).await;
    server.expect([Expect::Status { phase: "Loading" }]);
    reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
    server.is_done();
    let ready = |server: &ScriptedServer| {
        let status = server.statuses().pop().unwrap();
        let conditions = status["conditions"].as_array().unwrap().clone();
        conditions.into_iter().find(|one| one["type"] == "Ready").unwrap()
    };
    assert_eq!(ready(&server)["reason"], "GatewaysSilent");
    let message = ready(&server)["message"].as_str().unwrap().to_owned();
    assert!(message.contains("gateway-0") && message.contains("port 9091"), "{message}");

    feed.report(Report { instance: uid, acknowledged: None, draining: false });
    reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
    tokio::time::advance(LAUNCH_WAIT).await;
    server.expect([Expect::Status { phase: "Loading" }]);
    reconcile(model, context).await.unwrap();
    server.is_done();
    assert_eq!(ready(&server)["reason"], "WaitingForGateways");
}

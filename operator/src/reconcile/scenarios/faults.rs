//! Scenarios about an API server that fails in the middle: an answer that is lost, one that says to come back
//! later, and one that is away.

use super::*;

/// What the API server says about a POST of a name that is in use.
const EXISTS: &str = "already exists";

#[tokio::test]
async fn a_post_whose_answer_was_lost_is_found_and_kept() {
    // The API server stores the Deployment, and its answer does not arrive.
    let server = ScriptedServer::expecting([
        Expect::Create { kind: "ServiceAccount" },
        Expect::Create { kind: "ConfigMap" },
        Expect::Refuse { kind: "Deployment", code: 504, message: "the request timed out" },
    ]);
    let (context, _writers) = context(&server);
    let model = Arc::new(model(SPEC, Value::Null));
    let error = reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap_err();
    assert_eq!(error.label(), "Apply/Request");
    server.is_done();

    // The next pass finds it by the name, and that it is the model's own.
    let found = stored(&server.applied("Deployment")[0], 9);
    server.expect([
        Expect::Refuse { kind: "Deployment", code: 409, message: EXISTS },
        Expect::Get { kind: "Deployment", found: Some(found) },
        Expect::Create { kind: "Service" },
        Expect::Status { phase: "Pending" },
    ]);
    reconcile(model, context).await.unwrap();
    server.is_done();
}

#[tokio::test]
async fn an_api_server_that_is_away_delays_a_new_model_and_loses_nothing() {
    let server = ScriptedServer::default();
    let (context, _writers) = context(&server);
    let model = Arc::new(model(SPEC, Value::Null));
    let refuse = |kind, code, message| Expect::Refuse { kind, code, message };
    // 429 is an answer as well: the model comes back later, and later each time.
    let answers = [(503, "no leader"), (429, "too many requests"), (500, "etcd is away")];
    for (pass, (code, message)) in answers.into_iter().enumerate() {
        server.expect(["ServiceAccount", "ConfigMap", "Deployment"].map(|kind| refuse(kind, code, message)));
        let error = reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap_err();
        let wait = Duration::from_secs(1 << pass);
        assert_eq!(pause(&model, &error, &context), Action::requeue(wait), "after {code}");
        server.is_done();
    }
    server.expect(created("Pending"));
    reconcile(model, context).await.unwrap();
    server.is_done();
}

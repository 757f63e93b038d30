//! Weights that change under load: 90/10, then 50/50, then 0/100. Each is in force when it is acknowledged,
//! and no user moves who need not.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream;
use http::StatusCode;
use trustformers_proto::buckets::{BucketOwners, RevisionWeight};
use trustformers_proto::control::v1 as wire;

use crate::operator::TableBuilder;
use crate::pods::Pod;
use crate::{Scene, client, post, soon, text};

const USERS: usize = 20_000;
/// Requests at a time.
const CONCURRENT: usize = 32;
/// The weights of the two revisions, one pair after the other.
const STEPS: [SharedWeights; 3] = [
    SharedWeights { old: 90, new: 10 },
    SharedWeights { old: 50, new: 50 },
    SharedWeights { old: 0, new: 100 },
];

/// The weights of the two revisions.
#[derive(Debug, Clone, Copy)]
struct SharedWeights {
    old: u32,
    new: u32,
}
/// From a table's publication until a gateway has put it in force.
const IN_FORCE: Duration = Duration::from_secs(1);

/// Two pods, one of each revision.
struct Two {
    old: Pod,
    new: Pod,
}

impl Two {
    async fn start() -> Self {
        Self { old: Pod::named("old").await, new: Pod::named("new").await }
    }

    fn table(&self, counter: u64, weights: SharedWeights, split: wire::Split) -> TableBuilder {
        let pods = |pod: &Pod| -> [SocketAddr; 1] { [pod.address] };
        let table = TableBuilder::new(1, counter).route("a").split(split);
        table.backend("old", weights.old, &pods(&self.old)).backend("new", weights.new, &pods(&self.new))
    }
}

/// Publishes a table while requests go on. None fails, and it is in force in time.
async fn publish_under_load(scene: &Scene, table: TableBuilder) {
    let load = async {
        let requests = stream::iter(0..500).map(|_| scene.answer("a")).buffered(CONCURRENT);
        requests.map(|(status, _)| status).collect::<Vec<_>>().await
    };
    let published = async {
        let started = Instant::now();
        scene.publish(table).await;
        started.elapsed()
    };
    let (statuses, took) = tokio::join!(load, published);
    assert!(statuses.iter().all(|status| *status == StatusCode::OK), "{statuses:?}");
    assert!(took < IN_FORCE, "the table was in force after {took:?}");
}

/// The users that the new revision answers.
async fn users_of_new(scene: &Scene) -> BTreeSet<usize> {
    let http2 = client(true);
    let answers = stream::iter(0..USERS).map(|user| {
        let mut request = post(scene.http(), "/v1/generate", r#"{"model": "a"}"#);
        request.headers_mut().insert("x-user-id", format!("user-{user}").parse().unwrap());
        let answer = http2.request(request);
        async move {
            let (status, pod) = text(soon("an answer", answer).await.unwrap()).await;
            assert_eq!(status, StatusCode::OK);
            (user, pod)
        }
    });
    let answers: Vec<(usize, String)> = answers.buffered(CONCURRENT).collect().await;
    answers.into_iter().filter(|(_, pod)| pod == "new").map(|(user, _)| user).collect()
}

#[tokio::test]
async fn users_move_only_as_far_as_the_weights_change() {
    let two = Two::start().await;
    let shares = |SharedWeights { old, new }: SharedWeights| {
        [("old", old), ("new", new)]
            .map(|(revision, weight)| RevisionWeight { revision: revision.to_owned(), weight })
    };
    let mut owners = BucketOwners::with_weights(&shares(STEPS[0])).unwrap();
    let split = |owners: &BucketOwners| wire::Split {
        by: wire::SplitBy::User.into(),
        user_header: "x-user-id".to_owned(),
        salt: "s1".to_owned(),
        owners: owners.to_ranges(),
        ..wire::Split::default()
    };
    let scene = Scene::with_table(two.table(1, STEPS[0], split(&owners))).await;
    let mut before = BTreeSet::new();
    for (counter, weights) in (2..).zip(STEPS) {
        owners = owners.changed_to(&shares(weights)).unwrap();
        publish_under_load(&scene, two.table(counter, weights, split(&owners))).await;
        let after = users_of_new(&scene).await;
        let percent = after.len() as f64 * 100.0 / USERS as f64;
        assert!((percent - f64::from(weights.new)).abs() <= 2.0, "{weights:?}: {percent} %");
        // With nested sets no user has moved but the difference, which the weights ask for.
        let back: Vec<_> = before.difference(&after).collect();
        assert!(back.is_empty(), "{weights:?}: {} users moved back, such as {:?}", back.len(), back.first());
        before = after;
    }
    assert_eq!(before.len(), USERS);
}

#[tokio::test]
async fn requests_are_divided_exactly_as_soon_as_a_table_is_acknowledged() {
    let two = Two::start().await;
    let scene = Scene::with_table(two.table(1, STEPS[0], wire::Split::default())).await;
    for (counter, weights) in (2..).zip(STEPS) {
        publish_under_load(&scene, two.table(counter, weights, wire::Split::default())).await;
        // Every one of these begins behind the acknowledgement.
        let before = (two.old.requests(), two.new.requests());
        let requests = stream::iter(0..1000).map(|_| scene.answer("a")).buffered(CONCURRENT);
        let answers: Vec<_> = requests.collect().await;
        assert!(answers.iter().all(|(status, _)| *status == StatusCode::OK));
        let divided = (two.old.requests() - before.0, two.new.requests() - before.1);
        assert_eq!(divided, (weights.old as usize * 10, weights.new as usize * 10), "{weights:?}");
    }
}

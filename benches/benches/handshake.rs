//! How many handshakes does a responder do in a second, on one core?
//!
//! From the initiation's bytes to the response's: mac1, the sender, its timestamp, the transport keys.
//! Looking the peer up and the replay of timestamps cost next to nothing beside that. With
//! `--features aws-lc` ours uses AWS-LC, else dalek, which boringtun always does.

use std::sync::Arc;
use std::time::Duration;

use benches::{BUFFER_LEN, rng, time_with_refills, to_network};
use boringtun::noise::{Tunn, rate_limiter::RateLimiter};
use boringtun::x25519::{PublicKey, StaticSecret};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rand::RngExt;
use wg_common::id::ReceiverIndex;
use wg_common::protocol::INITIATION_LEN;
use wg_userspace::key::{PresharedKey, PrivateKey};
use wg_userspace::noise::{
    Identity, RemoteStatic, Timestamp, check_mac1, initiate, open_initiation,
};

/// Initiations that are made at once: each is used once.
const INITIATION_COUNT: usize = 64;
const OURS: &str = if cfg!(feature = "aws-lc") { "tidegate (aws-lc)" } else { "tidegate (dalek)" };

fn responder(c: &mut Criterion) {
    let mut group = c.benchmark_group("responder");
    group.throughput(Throughput::Elements(1));

    let mut rng_ = rng();
    let [alice, bob] = [(); 2].map(|()| Identity::new(PrivateKey::from_bytes(rng_.random())));
    let remote_of = |of: &Identity, other: &Identity| {
        RemoteStatic::new(of, *other.public_key(), PresharedKey::default())
    };
    let (of_alice, of_bob) = (remote_of(&alice, &bob), remote_of(&bob, &alice));
    let (local, remote) = (ReceiverIndex::from_wire([1; 4]), ReceiverIndex::from_wire([2; 4]));
    let mut count = 0;
    let mut initiations = [[0; INITIATION_LEN]; INITIATION_COUNT];
    group.bench_function(OURS, |b| {
        b.iter_custom(|iterations| {
            let mut refill_rng = rng();
            let refill = |initiations: &mut [[u8; INITIATION_LEN]; INITIATION_COUNT]| {
                for initiation in initiations {
                    count += 1;
                    let now = Timestamp::from_unix(1_800_000_000 + count, 0);
                    let made = initiate(&alice, &of_alice, local, now, None, &mut refill_rng);
                    *initiation = made.expect("the peer's key is a good one").1;
                }
            };
            let respond = |initiations: &mut [[u8; INITIATION_LEN]; INITIATION_COUNT], i: usize| {
                assert!(check_mac1(&bob, &initiations[i]));
                let opened = open_initiation(&bob, &initiations[i]).expect("it is for us");
                let authentic = opened.authenticate(&of_bob).expect("it is that peer's");
                authentic.respond(&of_bob, remote, None, &mut rng_).expect("it is answered");
            };
            time_with_refills(iterations, INITIATION_COUNT, &mut initiations, refill, respond)
        });
    });

    let mut rng = rng();
    let [a, b] = [(); 2].map(|()| StaticSecret::from(rng.random::<[u8; 32]>()));
    let (a_public, b_public) = (PublicKey::from(&a), PublicKey::from(&b));
    // Without a limit of its own: it would send cookies instead.
    let limiter = Arc::new(RateLimiter::new(&b_public, u64::MAX));
    let mut initiator = Tunn::new(a, b_public, None, None, 1, None);
    let mut responder = Tunn::new(b, a_public, None, None, 2, Some(limiter));
    let mut initiations = [[0; INITIATION_LEN]; INITIATION_COUNT];
    let mut response = [0; BUFFER_LEN];
    group.bench_function("boringtun", |b| {
        b.iter_custom(|iterations| {
            let refill = |initiations: &mut [[u8; INITIATION_LEN]; INITIATION_COUNT]| {
                for initiation in initiations {
                    to_network(initiator.format_handshake_initiation(initiation, true));
                }
            };
            let respond = |initiations: &mut [[u8; INITIATION_LEN]; INITIATION_COUNT], i: usize| {
                to_network(responder.decapsulate(None, &initiations[i], &mut response));
            };
            time_with_refills(iterations, INITIATION_COUNT, &mut initiations, refill, respond)
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(5));
    targets = responder
}
criterion_main!(benches);

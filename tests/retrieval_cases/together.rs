//! Calls for several pools at once.

use std::ops::Range;

use segattn::device::{
    Asking, Device, Gathering, Joining, Kind, PastHeads, PastPool, PoolBits, Probes, Rows, RowsMut,
    SelectedBlocks, Selection,
};

use super::{GROUP, HEADS, KV_HEADS, RULES, Tokens, pool, shape, upload};

/// Head size, tokens, queries and tokens of a chunk of each pool.
const POOLS: [[usize; 4]; 4] = [
    [32, 300, 5, 64],
    [32, 40, 9, 7],
    [64, 150, 3, 150],
    [32, 170, 1, 33],
];

/// What the heads of each pool may select: some have no more than they select, or nothing.
fn eligible(pool: usize) -> [Range<usize>; 2] {
    let count = POOLS[pool][1];
    match pool {
        1 => [3..count, 5..5],
        2 => [130..count, 0..count - 1],
        _ => [0..count, 7..count - 20],
    }
}

/// Pools that several calls at once fill, ask and read are those of one call each, to the bit.
pub fn calls_together_are_calls_alone<D: Device>(device: &D) {
    let tokens: Vec<Tokens> = (POOLS.iter().zip(80..))
        .map(|([dim, count, queries, _], seed)| Tokens::new(*dim, *count, *queries, seed))
        .collect();
    let alone: Vec<D::Pool> = (tokens.iter().zip(POOLS))
        .map(|(tokens, [.., chunk])| pool(device, tokens, chunk, &[tokens.count]))
        .collect();
    let pools = filled_together(device, &tokens);
    for (pool, alone) in pools.iter().zip(&alone) {
        let all = 0..alone.tokens();
        assert_eq!(pool.tokens(), all.end);
        assert_eq!(
            pool.read(device, all.clone()).unwrap(),
            alone.read(device, all).unwrap()
        );
    }
    let asks = Asks::new(device, &tokens);
    let selected = D::Pool::select_each(device, &asks.of(&pools)).expect("selections");
    let mut expected = Vec::new();
    for (i, (ask, blocks)) in asks.of(&alone).iter().zip(&selected).enumerate() {
        let one = ask
            .pool
            .select(device, &ask.probes, &ask.selection)
            .expect("a selection");
        let of = |blocks: &D::Blocks| blocks.tokens(device).expect("tokens");
        assert_eq!(of(blocks), of(&one), "{i}: {:?}", ask.selection);
        for head in 0..HEADS.len() {
            assert_eq!(blocks.count(head), ask.selection.count(head));
        }
        expected.push(one);
    }
    assert!(D::Pool::select_each(device, &[]).expect("none").is_empty());
    gathered(device, &asks, [&pools, &alone], [&selected, &expected]);
}

/// Two runs of tokens for each pool, in one call; the last pool's second run is empty.
fn filled_together<D: Device>(device: &D, tokens: &[Tokens]) -> Vec<D::Pool> {
    let mut pools: Vec<D::Pool> = POOLS
        .iter()
        .map(|[dim, _, _, chunk]| D::Pool::new(device, shape(*dim, *chunk, PoolBits::Sixteen)))
        .collect();
    let kv: Vec<[D::Buffer; 2]> = (tokens.iter())
        .map(|tokens| [&tokens.k, &tokens.v].map(|x| upload(device, x)))
        .collect();
    let joining = pools.iter_mut().zip(&kv).zip(tokens).enumerate();
    let joining = joining.map(|(i, ((pool, kv), tokens))| {
        let cut = if i == 3 {
            tokens.count
        } else {
            tokens.count / 3 + 1
        };
        let runs = [0..cut, cut..tokens.count].map(|run| {
            let width = KV_HEADS * tokens.dim;
            let [k, v] = kv;
            ([k, v].map(|x| Rows::packed(x, run.start, width)), run.len())
        });
        Joining {
            pool,
            runs: runs.into(),
        }
    });
    let mut joining: Vec<Joining<'_, D::Pool, D::Buffer>> = joining.collect();
    D::Pool::append_each(device, &HEADS, &mut joining).expect("tokens");
    pools
}

/// Every pool, asked by every rule.
struct Asks<B> {
    queries: Vec<B>,
    widths: Vec<usize>,
    eligible: Vec<[Range<usize>; 2]>,
}

impl<B> Asks<B> {
    fn new<D: Device<Buffer = B>>(device: &D, tokens: &[Tokens]) -> Self {
        Self {
            queries: tokens
                .iter()
                .map(|tokens| upload(device, &tokens.q))
                .collect(),
            widths: tokens
                .iter()
                .map(|tokens| KV_HEADS * GROUP * tokens.dim)
                .collect(),
            eligible: (0..POOLS.len()).map(eligible).collect(),
        }
    }

    fn of<'a, P>(&'a self, pools: &'a [P]) -> Vec<Asking<'a, P, B>> {
        let ask = |(rows, rule), i: usize| Asking {
            pool: &pools[i],
            probes: Probes {
                q: Rows::packed(&self.queries[i], 0, self.widths[i]),
                rows: POOLS[i][2],
                first: 0,
                capacity: POOLS[i][2],
                group: GROUP,
            },
            selection: Selection {
                kv_heads: &HEADS,
                eligible: &self.eligible[i],
                rows,
                rule,
                scale: None,
            },
        };
        let of_pools = |rule| (0..POOLS.len()).map(move |i| ask(rule, i));
        RULES.into_iter().flat_map(of_pools).collect()
    }
}

/// What is selected of the pools with heads of 32, copied at once and one by one.
fn gathered<D: Device>(
    device: &D,
    asks: &Asks<D::Buffer>,
    pools: [&[D::Pool]; 2],
    selected: [&[D::Blocks]; 2],
) {
    const MOST: usize = 48;
    let (dim, width) = (32, KV_HEADS * 32);
    let angles = Tokens::new(dim, 30, 1, 90);
    let table = |values: &[f32]| {
        let mut buffer = device.empty(Kind::Exact, values.len()).expect("memory");
        device.write(&mut buffer, 0, values).expect("a write");
        buffer
    };
    let tables = [&angles.k, &angles.v].map(|x| table(&x[..MOST * dim / 2]));
    let tables = (&tables[0], &tables[1]);
    let of_32: Vec<usize> = (0..selected[0].len())
        .filter(|i| i % POOLS.len() != 2)
        .collect();
    let read = |x: &D::Buffer| device.read(x, 0..device.len(x)).expect("a read");
    let rows = |together: bool| {
        let zeros = |_| device.zeros(Kind::Activation, of_32.len() * MOST * width);
        let [mut k, mut v] = [0, 1].map(|x| zeros(x).expect("memory"));
        let ask = asks.of(pools[usize::from(!together)]);
        let ask = of_32.iter().enumerate().map(|(place, i)| Gathering {
            pool: ask[*i].pool,
            blocks: &selected[usize::from(!together)][*i],
            past: PastHeads {
                kv_heads: &HEADS,
                ends: &[MOST, MOST - 2],
            },
            row: place * MOST,
        });
        let calls: Vec<Gathering<'_, D::Pool, D::Blocks>> = ask.collect();
        if together {
            let kv = [&mut k, &mut v];
            D::Pool::gather_each(device, &calls, tables, kv, width).expect("rows");
        } else {
            for one in &calls {
                let kv = [&mut k, &mut v].map(|x| RowsMut::packed(x, one.row, width));
                let gathered = one.pool.gather(device, one.blocks, &one.past, tables, kv);
                gathered.expect("rows");
            }
        }
        [read(&k), read(&v)]
    };
    let [together, alone] = [true, false].map(rows);
    assert!(alone[1].iter().filter(|x| **x != 0.0).count() > 1000);
    assert!(together == alone, "rows differ");
}

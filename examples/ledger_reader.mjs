// Epsilon that a ledger has spent, recomputed from its export: node ledger_reader.mjs EXPORT.json prints {adversary: {delta, epsilon}}.
// Privacy loss distributions on a grid, each by connecting the dots of its hockey-stick curve (Doroshenko et al. 2022, arXiv:2207.04380),
// composed by FFT. Adjacency zero-out or add-or-remove-one; what it cannot compose is an error. No package but node's own.
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";

const SIZE = 1 << 20, HALF = SIZE / 2; // points of the grid, half of them negative
const TAIL = 9; // deviations of a Gaussian, beyond which lies 1e-19
let step = 1e-4; // of the grid

function entries(path) {
  let before = "0".repeat(64);
  return JSON.parse(readFileSync(path, "utf8")).entries.map(({ seq, kind, key, payload, prev_hash, hash }, at) => {
    const text = JSON.stringify([seq, kind, key, payload, prev_hash]);
    const ascii = text.replace(/[\u007f-\uffff]/g, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
    const found = createHash("sha256").update(ascii).digest("hex");
    if (seq !== at + 1 || prev_hash !== before || hash !== found) throw new Error(`entry ${at + 1} was changed`);
    before = hash;
    return { kind, key, payload: JSON.parse(payload) };
  });
}

function erfc(x) {
  if (x < 0) return 2 - erfc(-x);
  let sum = 0;
  if (x < 2.5) for (let n = 0, term = x; Math.abs(term) > 1e-18; n++, term *= (-x * x) / n) sum += term / (2 * n + 1);
  else for (let n = 80; n > 0; n--) sum = n / 2 / (x + sum);
  return x < 2.5 ? 1 - (2 / Math.sqrt(Math.PI)) * sum : Math.exp(-x * x) / Math.sqrt(Math.PI) / (x + sum);
}
const above = (x) => erfc(x / Math.SQRT2) / 2; // share of a standard Gaussian above x

// P(loss > e) - exp(e) Q(loss > e) of a Gaussian with this noise, sampled at this rate; the unit is removed (sign 1) or added (-1)
function hockeyStick(e, rate, noise, sign) {
  const ratio = (Math.expm1(sign * e) + rate) / rate;
  if (rate < 1 && ratio <= 0) return sign > 0 ? -Math.expm1(e) : 0;
  const x = sign * (noise * (rate < 1 ? Math.log(ratio) : sign * e) + 0.5 / noise);
  const [without, within] = [above(x), above(x - sign / noise)];
  const mixed = (1 - rate) * without + rate * within;
  return Math.max(0, sign > 0 ? mixed - Math.exp(e) * without : without - Math.exp(e) * mixed);
}

function sampledGaussian(rate, noise, sign) { // {low, mass, infinity}: mass[i] is the probability of a loss of (low + i) steps
  if (!(noise > 0 && rate > 0 && rate <= 1)) throw new Error(`noise ${noise} at rate ${rate} is no Gaussian`);
  const loss = (x) => sign * (rate === 1 ? (x - 0.5) / noise ** 2 : Math.log1p(rate * Math.expm1((x - 0.5) / noise ** 2)));
  const ends = [loss(-TAIL * noise), loss(1 + TAIL * noise)].sort((a, b) => a - b);
  const low = Math.floor(ends[0] / step) - 1, count = Math.ceil(ends[1] / step) + 2 - low;
  const curve = Float64Array.from({ length: count }, (_, i) => hockeyStick((low + i) * step, rate, noise, sign));
  const up = Math.expm1(step), down = -Math.expm1(-step);
  const mass = curve.map((d, i) => i && i < count - 1 ? Math.max(0, (curve[i + 1] - d) / up - (d - curve[i - 1]) / down) : 0);
  mass[count - 1] = (curve[count - 2] - curve[count - 1]) / down;
  mass[0] = Math.max(0, 1 - curve[count - 1] - mass.reduce((a, b) => a + b, 0));
  return { low, mass, infinity: curve[count - 1] };
}

// A draw, secret or open, whose unit is in several releases; each point's mass is shared by its two neighbours on the grid so that
// the curve is never below the true one.
function sampled({ kind, sampling_probability: rate, event }, sign) {
  const [within, without] = [1, -1].map((each) => composed([...leaves(event)], each)); // losses of those who are in, of those who are not
  const mass = new Float64Array(SIZE), open = kind === "OpenlySampled";
  const outer = (loss) => sign * (open ? loss : Math.log1p(rate * Math.expm1(loss)));
  const add = (loss, share) => {
    const low = Math.floor(loss / step), high = (share * -Math.expm1(low * step - loss)) / -Math.expm1(-step);
    mass[low + HALF] += share - high;
    if (high) mass[low + 1 + HALF] += high;
  };
  const [ofWithin, ofWithout] = sign > 0 ? [rate, open ? 0 : 1 - rate] : [0, open ? rate : 1];
  if (ofWithin) within.mass.forEach((p, i) => p && add(outer((i - HALF) * step), p * ofWithin));
  if (ofWithout) without.mass.forEach((q, i) => q && add(outer((HALF - i) * step), q * ofWithout));
  if (open) mass[HALF] += 1 - rate;
  return { low: -HALF, mass, infinity: ofWithin * within.infinity + ofWithout * without.infinity };
}

function fft(re, im, sign) {
  for (let i = 1, j = 0; i < SIZE; i++) {
    for (let bit = SIZE >> 1; (j ^= bit) < bit; bit >>= 1);
    if (i < j) [re[i], re[j], im[i], im[j]] = [re[j], re[i], im[j], im[i]];
  }
  for (let half = 1; half < SIZE; half *= 2) {
    for (let k = 0; k < half; k++) {
      const [c, s] = [Math.cos((Math.PI * k) / half), Math.sin((sign * Math.PI * k) / half)];
      for (let i = k, j = k + half; i < SIZE; i += 2 * half, j += 2 * half) {
        const [a, b] = [re[j] * c - im[j] * s, re[j] * s + im[j] * c];
        [re[j], im[j], re[i], im[i]] = [re[i] - a, im[i] - b, re[i] + a, im[i] + b];
      }
    }
  }
}

function* leaves(event, count = 1) {
  if (event.kind === "SelfComposed") yield* leaves(event.event, count * event.count);
  else if (event.kind === "Composed") for (const part of event.events) yield* leaves(part, count);
  else if (event.kind !== "NoOp" && count) yield [event, count];
}

function distribution(event, sign) {
  const { kind, noise_multiplier: noise, sampling_probability: rate, event: query } = event;
  if (kind === "Gaussian") return sampledGaussian(1, noise, sign);
  if (kind === "PoissonSampled" && query.kind === "Gaussian") return sampledGaussian(rate, query.noise_multiplier, sign);
  if (kind === "PoissonSampled" || kind === "OpenlySampled") return sampled(event, sign);
  throw new Error(`cannot compose an event of kind ${kind}`);
}

function composed(events, sign) {
  const [re, im] = [new Float64Array(SIZE).fill(1), new Float64Array(SIZE)];
  let [reach, variance, finite] = [0, 0, 0];
  for (const [event, count] of events) {
    const { low, mass, infinity } = distribution(event, sign), [a, b] = [new Float64Array(SIZE), new Float64Array(SIZE)];
    const mean = mass.reduce((sum, p, i) => sum + p * (low + i), 0);
    reach += count * Math.abs(mean);
    variance += count * mass.reduce((sum, p, i) => sum + p * (low + i - mean) ** 2, 0);
    if (reach + 12 * Math.sqrt(variance) > HALF || mass.length > SIZE) throw new RangeError("the grid is too short");
    finite += count * Math.log1p(-infinity);
    mass.forEach((p, i) => (a[(low + i + SIZE) % SIZE] += p));
    fft(a, b, -1);
    for (let i = 0; i < SIZE; i++) {
      const [length, angle] = [Math.hypot(a[i], b[i]) ** count, Math.atan2(b[i], a[i]) * count];
      const [c, s] = [length * Math.cos(angle), length * Math.sin(angle)];
      [re[i], im[i]] = [re[i] * c - im[i] * s, re[i] * s + im[i] * c];
    }
  }
  fft(re, im, 1);
  const mass = Float64Array.from({ length: SIZE }, (_, i) => Math.max(0, re[(i + HALF) % SIZE] / SIZE));
  return { low: -HALF, mass, infinity: -Math.expm1(finite) };
}

function least({ low, mass, infinity }, delta) { // the least epsilon at which the hockey-stick curve is at most delta
  if (!(delta > 0 && mass.every(Number.isFinite))) throw new Error("a number is missing, or too large to compose");
  let [p, q] = [infinity, 0]; // of the losses above epsilon: probability, and the same weighted by exp(-loss)
  for (let i = mass.length - 1; i >= 0; i--) {
    if (p - Math.exp((low + i) * step) * q > delta) return Math.max(0, Math.log((p - delta) / q));
    p += mass[i];
    q += mass[i] * Math.exp(-(low + i) * step);
  }
  return 0;
}

function renyi({ kind, noise_multiplier, sampling_probability: rate = 1, event: query }, order) {
  const noise = noise_multiplier ?? query.noise_multiplier, width = noise / 1000;
  if (kind === "Gaussian") return order / (2 * noise ** 2);
  if (kind !== "PoissonSampled" || query.kind !== "Gaussian") throw new Error(`cannot filter an event of kind ${kind}`);
  let moment = 0; // of the likelihood ratio (Mironov et al. 2019, arXiv:1908.10530, section 3.3), by the trapezoid rule
  for (let x = -20 * noise; x < order + 20 * noise; x += width)
    moment += Math.exp(order * Math.log1p(rate * Math.expm1((x - 0.5) / noise ** 2)) - x ** 2 / (2 * noise ** 2));
  return Math.log((moment * width) / noise / Math.sqrt(2 * Math.PI)) / (order - 1);
}

function epsilon(events, delta, order) {
  if (JSON.stringify(events).includes('"NonPrivate"')) return "Infinity";
  if (order !== undefined) { // the releases were chosen as they came: a filter counts them (Feldman and Zrnic 2021, arXiv:2008.11193)
    const spent = events.reduce((sum, [event, count]) => sum + count * renyi(event, order), 0);
    return Math.max(0, spent + Math.log1p(-1 / order) - Math.log(delta * order) / (order - 1));
  }
  for (step = 1e-4; step < 1; step *= 2) {
    try {
      const found = Math.max(...[1, -1].map((sign) => least(composed(events, sign), delta)));
      if (found < (HALF * step) / 2) return found; // beyond, losses could have come around from the other end
    } catch (problem) {
      if (!(problem instanceof RangeError)) throw problem;
    }
  }
  return "Infinity";
}

// {adversary: [[event, how often]]}; the arms of a deal have disjoint clients, so an event counts as often as in the arm with the most
function spending(chain) {
  const voids = new Set(chain.filter(({ kind }) => kind === "void").map(({ key }) => key)), tally = {}, spent = {};
  for (const { payload } of chain.filter(({ kind, key }) => kind === "reserve" && !voids.has(key)))
    for (const [adversary, event] of Object.entries(payload.events)) {
      const { deal = null, arm = null } = payload.arm ?? {}, arms = (tally[JSON.stringify([adversary, event, deal])] ??= {});
      arms[arm] = (arms[arm] ?? 0) + 1;
    }
  for (const [key, arms] of Object.entries(tally)) {
    const [adversary, event] = JSON.parse(key);
    (spent[adversary] ??= []).push(...leaves(event, Math.max(...Object.values(arms))));
  }
  return spent;
}

const chain = entries(process.argv[2]), reserved = chain.filter(({ kind }) => kind === "reserve").map(({ payload }) => payload);
if (chain[0].payload.adjacency === "replace-one") throw new Error("replace-one has neighbours of another kind");
const delta = reserved.at(-1)?.budget.target_delta, order = reserved.find((each) => "filter_order" in each)?.filter_order;
const rows = Object.entries(spending(chain)).map(([who, events]) => [who, { delta, epsilon: epsilon(events, delta, order) }]);
console.log(JSON.stringify(Object.fromEntries(rows)));

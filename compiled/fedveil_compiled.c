/* Masks and noise of fedveil, for processors with VAES and AVX-512: the same bits as its own, from AES-256 in counter mode.

   add_masks: the words that privacy/secagg/masks.py adds for suites 1 to 3, where each CHUNK bytes begin at the block
     N || 00000002, N the number of the chunk in 96 bits, big-endian.
   key_stream: the bytes of privacy/mechanisms/randomness.py, whose counter begins at 0.
   look_up, add_on_lattice: the numbers of privacy/mechanisms/discrete_gaussian.py.

   No branch depends on a key, a word or a value. No address depends on a key or on what is masked. Addresses do depend
   on words in look_up, and so does how many places it leaves. */

#if !defined(__x86_64__) || !defined(__GNUC__)
#error "fedveil-compiled is for x86-64, by GCC or Clang; leave it out: fedveil draws the same bits without it"
#endif

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,vaes,aes,sse4.1")))
#define INLINE static inline __attribute__((always_inline)) WIDE
#define CHUNK ((Py_ssize_t)1 << 18)
#define KEY 32
#define ROUNDS 14
#define ENTRY 16  /* bits of a word that say which of the table's entries */
#define LANES 8  /* vectors of 64 bytes at a time: as many as hide the latency of a round */

typedef __m512i Schedule[ROUNDS + 1];

INLINE __m128i mixed(__m128i key, __m128i assist) {
  key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
  key = _mm_xor_si128(key, _mm_slli_si128(key, 8));
  return _mm_xor_si128(key, assist);
}

/* FIPS 197, section 5.2, for keys of 256 bits; the constant of a round has to be one of the instruction. */
WIDE static void expand(const uint8_t *key, Schedule rounds) {
  __m128i even = _mm_loadu_si128((const __m128i *)key), odd = _mm_loadu_si128((const __m128i *)(key + 16));
#define EVEN(at, constant)                                                                         \
  even = mixed(even, _mm_shuffle_epi32(_mm_aeskeygenassist_si128(odd, constant), 0xff));           \
  rounds[at] = _mm512_broadcast_i32x4(even)
#define ODD(at)                                                                                    \
  odd = mixed(odd, _mm_shuffle_epi32(_mm_aeskeygenassist_si128(even, 0), 0xaa));                   \
  rounds[at] = _mm512_broadcast_i32x4(odd)
  rounds[0] = _mm512_broadcast_i32x4(even);
  rounds[1] = _mm512_broadcast_i32x4(odd);
  EVEN(2, 0x01); ODD(3);
  EVEN(4, 0x02); ODD(5);
  EVEN(6, 0x04); ODD(7);
  EVEN(8, 0x08); ODD(9);
  EVEN(10, 0x10); ODD(11);
  EVEN(12, 0x20); ODD(13);
  EVEN(14, 0x40);
}

/* Words of a width with the mask added or subtracted; the mask itself for the width 0. */
INLINE __m512i combined(__m512i words, __m512i mask, int width, int adds) {
  if (width == 0) return mask;
  if (width == 4) return adds ? _mm512_add_epi32(words, mask) : _mm512_sub_epi32(words, mask);
  return adds ? _mm512_add_epi16(words, mask) : _mm512_sub_epi16(words, mask);
}

/* Four blocks of key stream, and the counters of the next four: numbers of 128 bits, whose lower halves are counted. */
INLINE __m512i start(__m512i *counters, __m512i first) {
  const __m512i swap = _mm512_broadcast_i32x4(_mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  __m512i blocks = _mm512_xor_si512(_mm512_shuffle_epi8(*counters, swap), first);
  *counters = _mm512_add_epi64(*counters, _mm512_set_epi64(0, 4, 0, 4, 0, 4, 0, 4));
  return blocks;
}

INLINE void add(uint8_t *words, Py_ssize_t size, __m128i first, const Schedule rounds, int width, int adds) {
  __m512i counters = _mm512_add_epi64(_mm512_broadcast_i32x4(first), _mm512_set_epi64(0, 3, 0, 2, 0, 1, 0, 0));
  Py_ssize_t done = 0;
  for (; done + 64 * LANES <= size; done += 64 * LANES) {
    __m512i blocks[LANES];
#pragma GCC unroll 8
    for (int lane = 0; lane < LANES; lane++) blocks[lane] = start(&counters, rounds[0]);
#pragma GCC unroll 14
    for (int round = 1; round < ROUNDS; round++)
#pragma GCC unroll 8
      for (int lane = 0; lane < LANES; lane++) blocks[lane] = _mm512_aesenc_epi128(blocks[lane], rounds[round]);
#pragma GCC unroll 8
    for (int lane = 0; lane < LANES; lane++) {
      uint8_t *at = words + done + 64 * lane;
      __m512i mask = _mm512_aesenclast_epi128(blocks[lane], rounds[ROUNDS]);
      _mm512_storeu_si512(at, combined(_mm512_loadu_si512(at), mask, width, adds));
    }
  }
  for (; done < size; done += 64) {
    __mmask64 here = size - done < 64 ? (1ull << (size - done)) - 1 : ~0ull;
    __m512i block = start(&counters, rounds[0]);
    for (int round = 1; round < ROUNDS; round++) block = _mm512_aesenc_epi128(block, rounds[round]);
    block = _mm512_aesenclast_epi128(block, rounds[ROUNDS]);
    block = combined(_mm512_maskz_loadu_epi8(here, words + done), block, width, adds);
    _mm512_mask_storeu_epi8(words + done, here, block);
  }
}

WIDE static void add_all(const Py_buffer *words, int width, const uint8_t *keys, const uint8_t *adds, Py_ssize_t count) {
  Schedule rounds;
  for (Py_ssize_t from = 0; from < words->len; from += CHUNK) {
    uint8_t *at = (uint8_t *)words->buf + from;
    uint64_t number = (uint64_t)(from / CHUNK);
    Py_ssize_t size = words->len - from < CHUNK ? words->len - from : CHUNK;
    for (Py_ssize_t each = 0; each < count; each++) {
      __m128i first = _mm_set_epi64x((long long)(number >> 32), (long long)(number << 32 | 2));
      expand(keys + KEY * each, rounds);
      if (width == 4 && adds[each]) add(at, size, first, rounds, 4, 1);
      else if (width == 4) add(at, size, first, rounds, 4, 0);
      else if (adds[each]) add(at, size, first, rounds, 2, 1);
      else add(at, size, first, rounds, 2, 0);
    }
  }
}

static PyObject *add_masks(PyObject *module, PyObject *arguments) {
  Py_buffer words, keys, adds;
  int width;
  (void)module;
  if (!PyArg_ParseTuple(arguments, "w*iy*y*", &words, &width, &keys, &adds)) return NULL;
  int fits = (width == 2 || width == 4) && words.len % width == 0 && keys.len == KEY * adds.len;
  if (fits) {
    Py_BEGIN_ALLOW_THREADS
    add_all(&words, width, keys.buf, adds.buf, adds.len);
    Py_END_ALLOW_THREADS
  } else {
    PyErr_SetString(PyExc_ValueError, "whole words of 2 or 4 bytes, and a key of 32 bytes and a sign for each mask");
  }
  PyBuffer_Release(&words);
  PyBuffer_Release(&keys);
  PyBuffer_Release(&adds);
  if (!fits) return NULL;
  Py_RETURN_NONE;
}

/* The key stream from this byte on; its blocks are counted from 0. */
WIDE static void stream_from(uint8_t *out, Py_ssize_t size, const uint8_t *key, uint64_t place) {
  Schedule rounds;
  uint8_t block[16] = {0};
  Py_ssize_t inside = (Py_ssize_t)(place % 16), head = inside && size ? 16 - inside : 0;
  if (head > size) head = size;
  expand(key, rounds);
  if (head) {
    add(block, 16, _mm_set_epi64x(0, (long long)(place / 16)), rounds, 0, 1);
    memcpy(out, block + inside, (size_t)head);
  }
  add(out + head, size - head, _mm_set_epi64x(0, (long long)((place + 15) / 16)), rounds, 0, 1);
}

static PyObject *key_stream(PyObject *module, PyObject *arguments) {
  Py_buffer out, key;
  unsigned long long place;
  (void)module;
  if (!PyArg_ParseTuple(arguments, "w*y*K", &out, &key, &place)) return NULL;
  int fits = key.len == KEY;
  if (fits) {
    Py_BEGIN_ALLOW_THREADS
    stream_from(out.buf, out.len, key.buf, place);
    Py_END_ALLOW_THREADS
  } else {
    PyErr_SetString(PyExc_ValueError, "a key of 32 bytes");
  }
  PyBuffer_Release(&out);
  PyBuffer_Release(&key);
  if (!fits) return NULL;
  Py_RETURN_NONE;
}

/* The numbers of `count` words; those of entries from `owned` on are left, and their places noted. */
WIDE static Py_ssize_t look_all_up(const uint32_t *words, Py_ssize_t count, const int32_t *starts, uint32_t low,
                                   uint32_t owned, int32_t *out, int32_t *left) {
  __m512i places = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  Py_ssize_t found = 0;
  for (Py_ssize_t done = 0; done < count; done += 16) {
    __mmask16 here = (__mmask16)(count - done < 16 ? (1u << (count - done)) - 1 : 0xffffu);
    __m512i word = _mm512_maskz_loadu_epi32(here, words + done), entry = _mm512_srli_epi32(word, ENTRY);
    __m512i start = _mm512_i32gather_epi32(entry, starts, 4), inside = _mm512_and_si512(word, _mm512_set1_epi32((int)low));
    __mmask16 over = _mm512_mask_cmpge_epu32_mask(here, entry, _mm512_set1_epi32((int)owned));
    unsigned many = (unsigned)__builtin_popcount(over);
    _mm512_mask_storeu_epi32(out + done, here, _mm512_add_epi32(start, inside));
    _mm512_mask_storeu_epi32(left + found, (__mmask16)((1u << many) - 1), _mm512_maskz_compress_epi32(over, places));
    places = _mm512_add_epi32(places, _mm512_set1_epi32(16));
    found += many;
  }
  return found;
}

static PyObject *look_up(PyObject *module, PyObject *arguments) {
  Py_buffer words, starts, out, left;
  unsigned low, owned;
  Py_ssize_t found = -1;
  (void)module;
  if (!PyArg_ParseTuple(arguments, "y*y*IIw*w*", &words, &starts, &low, &owned, &out, &left)) return NULL;
  if (starts.len == 4 << ENTRY && words.len % 4 == 0 && out.len == words.len && left.len == words.len) {
    Py_BEGIN_ALLOW_THREADS
    found = look_all_up(words.buf, words.len / 4, starts.buf, low, owned, out.buf, left.buf);
    Py_END_ALLOW_THREADS
  } else {
    PyErr_SetString(PyExc_ValueError, "65536 entries of 4 bytes, and a number and a place of 4 bytes for each word of 4");
  }
  PyBuffer_Release(&words);
  PyBuffer_Release(&starts);
  PyBuffer_Release(&out);
  PyBuffer_Release(&left);
  return found < 0 ? NULL : PyLong_FromSsize_t(found);
}

/* Values, rounded to whole steps, and as many steps of noise, in place; divided, since a product would round otherwise. */
WIDE static void add_all_on_lattice(float *values, Py_ssize_t count, const int32_t *noise, double step) {
  const __m512d steps = _mm512_set1_pd(step);
  for (Py_ssize_t done = 0; done < count; done += 8) {
    __mmask8 here = (__mmask8)(count - done < 8 ? (1u << (count - done)) - 1 : 0xffu);
    __m512d value = _mm512_div_pd(_mm512_cvtps_pd(_mm256_maskz_loadu_ps(here, values + done)), steps);
    value = _mm512_roundscale_pd(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    value = _mm512_add_pd(value, _mm512_cvtepi32_pd(_mm256_maskz_loadu_epi32(here, noise + done)));
    _mm256_mask_storeu_ps(values + done, here, _mm512_cvtpd_ps(_mm512_mul_pd(value, steps)));
  }
}

static PyObject *add_on_lattice(PyObject *module, PyObject *arguments) {
  Py_buffer values, noise;
  double step;
  (void)module;
  if (!PyArg_ParseTuple(arguments, "w*y*d", &values, &noise, &step)) return NULL;
  int fits = values.len % 4 == 0 && noise.len == values.len;
  if (fits) {
    Py_BEGIN_ALLOW_THREADS
    add_all_on_lattice(values.buf, values.len / 4, noise.buf, step);
    Py_END_ALLOW_THREADS
  } else {
    PyErr_SetString(PyExc_ValueError, "a number of noise of 4 bytes for each value of 4");
  }
  PyBuffer_Release(&values);
  PyBuffer_Release(&noise);
  if (!fits) return NULL;
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"add_masks", add_masks, METH_VARARGS, "Add (sign 1) or subtract (sign 0) the mask of each key, in place."},
    {"key_stream", key_stream, METH_VARARGS, "Write the bytes of a key's stream from a place on."},
    {"look_up", look_up, METH_VARARGS, "Write the numbers of words, and the places that are left; return how many are."},
    {"add_on_lattice", add_on_lattice, METH_VARARGS, "Round values to whole steps, and add steps of noise, in place."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fedveil_compiled", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_fedveil_compiled(void) {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("vaes")) {
    PyErr_SetString(PyExc_ImportError, "this processor has no VAES with AVX-512");
    return NULL;
  }
  return PyModule_Create(&definition);
}

/* Masks of encrypted sums, added to a vector while their key stream is made, for processors with VAES and AVX-512.

   The same words as fedveil's privacy/secagg/masks.py adds for suites 1 to 3: AES-256 in counter mode, where each CHUNK
   bytes begin at the block N || 00000002, N the number of the chunk in 96 bits, big-endian. No branch and no address
   depends on a key or on a word. */

#if !defined(__x86_64__) || !defined(__GNUC__)
#error "fedveil-masks is for x86-64, by GCC or Clang; leave it out: fedveil adds the same masks without it"
#endif

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <immintrin.h>
#include <stdint.h>

#define WIDE __attribute__((target("avx512f,avx512bw,vaes,aes,sse4.1")))
#define INLINE static inline __attribute__((always_inline)) WIDE
#define CHUNK ((Py_ssize_t)1 << 18)
#define KEY 32
#define ROUNDS 14
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

INLINE __m512i combined(__m512i words, __m512i mask, int width, int adds) {
  if (width == 4) return adds ? _mm512_add_epi32(words, mask) : _mm512_sub_epi32(words, mask);
  return adds ? _mm512_add_epi16(words, mask) : _mm512_sub_epi16(words, mask);
}

/* Four blocks of key stream, and the counters of the next four. */
INLINE __m512i start(__m512i *counters, __m512i first) {
  const __m512i swap = _mm512_broadcast_i32x4(_mm_set_epi8(12, 13, 14, 15, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  __m512i blocks = _mm512_xor_si512(_mm512_shuffle_epi8(*counters, swap), first);
  *counters = _mm512_add_epi32(*counters, _mm512_set_epi32(4, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0));
  return blocks;
}

INLINE void add(uint8_t *words, Py_ssize_t size, uint64_t number, const Schedule rounds, int width, int adds) {
  uint8_t nonce[16] = {0};
  for (int place = 0; place < 8; place++) nonce[11 - place] = (uint8_t)(number >> (8 * place));
  __m512i counters = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)nonce));
  counters = _mm512_add_epi32(counters, _mm512_set_epi32(5, 0, 0, 0, 4, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0));
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
    Py_ssize_t size = words->len - from < CHUNK ? words->len - from : CHUNK;
    for (Py_ssize_t each = 0; each < count; each++) {
      expand(keys + KEY * each, rounds);
      if (width == 4 && adds[each]) add(at, size, (uint64_t)(from / CHUNK), rounds, 4, 1);
      else if (width == 4) add(at, size, (uint64_t)(from / CHUNK), rounds, 4, 0);
      else if (adds[each]) add(at, size, (uint64_t)(from / CHUNK), rounds, 2, 1);
      else add(at, size, (uint64_t)(from / CHUNK), rounds, 2, 0);
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

static PyMethodDef methods[] = {
    {"add_masks", add_masks, METH_VARARGS, "Add (sign 1) or subtract (sign 0) the mask of each key, in place."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fedveil_masks", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_fedveil_masks(void) {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("vaes")) {
    PyErr_SetString(PyExc_ImportError, "this processor has no VAES with AVX-512");
    return NULL;
  }
  return PyModule_Create(&definition);
}

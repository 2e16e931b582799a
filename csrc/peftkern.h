// SPDX-License-Identifier: Apache-2.0
// The C ABI of peftkern's native libraries. It depends on neither torch nor Python, and no call ends the process.
//
// Every call takes one struct and returns a status. Every field is eight bytes wide, so structs have no padding and a
// caller can fill one as an array. Strides count elements. The last dimension of a tensor has stride 1 unless all its
// strides are listed. A null pointer means "not given" for an input and "not needed" for a gradient.
//
// peftkern/native/abi.py declares the same structs; tests/native/test_abi.py compares the two.
#ifndef PEFTKERN_H_
#define PEFTKERN_H_

#include <stdint.h>

#define PEFTKERN_ABI_VERSION 3
#define PEFTKERN_CUDA_ABI_VERSION 6

#if defined(PEFTKERN_BUILD_LIBRARY)
#define PEFTKERN_API __attribute__((visibility("default")))
#else
#define PEFTKERN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum peftkern_status {
  PEFTKERN_OK = 0,
  PEFTKERN_INVALID_ARGUMENT = 1,
  PEFTKERN_UNSUPPORTED_ISA = 2,
  PEFTKERN_OUT_OF_MEMORY = 3,
  PEFTKERN_MISALIGNED = 4,     // CUDA: a pointer or stride is not a multiple of 16 bytes
  PEFTKERN_SHARED_MEMORY = 5,  // CUDA: the device has too little shared memory for the kernel
  PEFTKERN_CUDA_ERROR = 1000,  // plus a cudaError_t
};

enum peftkern_dtype {
  PEFTKERN_FLOAT32 = 0,
  PEFTKERN_FLOAT16 = 1,
  PEFTKERN_BFLOAT16 = 2,
  PEFTKERN_INT32 = 3,
  PEFTKERN_INT64 = 4,
};

// Instruction sets, plainest first within an architecture. AUTO selects the fastest one for the dtype on this processor.
enum peftkern_isa {
  PEFTKERN_ISA_AUTO = 0,
  PEFTKERN_ISA_PORTABLE = 1,
  PEFTKERN_ISA_AVX2 = 2,
  PEFTKERN_ISA_AVX512 = 3,
  PEFTKERN_ISA_AVX512_BF16 = 4,
  PEFTKERN_ISA_AMX_BF16 = 5,
  PEFTKERN_ISA_SVE256 = 6,  // SVE with vectors of 256 bits; NEON is what PORTABLE means on AArch64
  PEFTKERN_ISA_NEON_BF16 = 7,
};

// Attention over [prefix | sequence]. peftkern/reference.py defines the result.
typedef struct peftkern_attention {
  const void* q;             // [batch, num_heads, q_len, head_dim]
  const void* k;             // [batch, num_kv_heads, kv_len, head_dim]
  const void* v;             // [batch, num_kv_heads, kv_len, value_dim]
  const void* prefix_k;      // [bank_size, num_kv_heads, prefix_len, head_dim], prefix_dtype
  const void* prefix_v;      // [bank_size, num_kv_heads, prefix_len, value_dim], prefix_dtype
  const float* sinks;        // [num_heads], contiguous
  const void* bias;          // [batch, num_heads, q_len, kv_len], bias_dtype; stride 0 along broadcast dimensions
  const float* prefix_bias;  // [num_heads, prefix_len]; stride 0 along broadcast dimensions
  const float* gate;         // [num_heads], contiguous
  const uint8_t* key_mask;   // [batch, kv_len]
  const void* cu_seqlens;    // [num_sequences + 1], contiguous
  const void* prefix_ids;    // [batch or num_sequences], contiguous
  const void* prefix_lens;   // [bank_size], contiguous
  // [bank_size, prefix_len, 2], contiguous; null: token j of prefix i is row j of entry i of prefix_k and prefix_v.
  // Else it is row [i, j, 1] of entry [i, j, 0], and of k and v where that is -1. prefix_k is then
  // [source_size, num_kv_heads, source_len, head_dim]. CPU only.
  const int64_t* prefix_rows;
  void* out;   // [batch, num_heads, q_len, value_dim]
  float* lse;  // [batch, num_heads, q_len], contiguous
  int64_t batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, value_dim, bank_size, prefix_len;
  int64_t num_sequences;                           // in cu_seqlens
  int64_t source_size, source_len;                 // with prefix_rows
  int64_t q_stride[3], k_stride[3], v_stride[3];   // batch, head, row
  int64_t prefix_k_stride[3], prefix_v_stride[3];  // bank, head, row
  int64_t bias_stride[4], prefix_bias_stride[2], key_mask_stride[2];
  int64_t out_stride[3];
  int64_t dtype, prefix_dtype, bias_dtype, cu_seqlens_dtype, prefix_ids_dtype, prefix_lens_dtype;
  int64_t causal, window, prefix_in_window;  // window 0: none
  int64_t dropout_seed, num_threads, isa;
  double scale, softcap, dropout_p;  // softcap 0: none
} peftkern_attention;

// `forward.out` and `forward.lse` are inputs here: the results of the forward.
typedef struct peftkern_attention_backward {
  peftkern_attention forward;
  const void* dout;              // [batch, num_heads, q_len, value_dim]
  const float* dlse;             // [batch, num_heads, q_len]
  void *dq, *dk, *dv;            // shaped like q, k, v
  float *dprefix_k, *dprefix_v;  // shaped like prefix_k and prefix_v, contiguous
  float* dsinks;                 // [num_heads]
  float* dbias;                  // [bias_size], contiguous
  float* dprefix_bias;           // [prefix_bias_size], contiguous
  float* dgate;                  // [num_heads]
  int64_t dout_stride[3], dlse_stride[3], dq_stride[3], dk_stride[3], dv_stride[3];
  int64_t bias_size[4], prefix_bias_size[2];
} peftkern_attention_backward;

// out[b] = [prompt | weight[input_ids[b]]]
typedef struct peftkern_embedding {
  const void* input_ids;   // [batch, seq_len]
  const void* weight;      // [vocab_size, dim]
  const void* prompt;      // [bank_size, prompt_len, dim], prompt_dtype
  const void* prompt_ids;  // [batch], contiguous
  void* out;               // [batch, prompt_len + seq_len, dim], contiguous
  int64_t batch, seq_len, vocab_size, dim, bank_size, prompt_len;
  int64_t input_ids_stride[2], weight_stride[2], prompt_stride[3];
  int64_t dtype, prompt_dtype, input_ids_dtype, prompt_ids_dtype, num_threads;
} peftkern_embedding;

typedef struct peftkern_embedding_backward {
  peftkern_embedding forward;
  const void* dout;          // [batch, prompt_len + seq_len, dim]
  float *dweight, *dprompt;  // contiguous
  int64_t dout_stride[2];    // batch, row
} peftkern_embedding_backward;

PEFTKERN_API int peftkern_abi_version(void);
PEFTKERN_API const char* peftkern_error_string(int status);

// Whether both this processor and this build support an instruction set.
PEFTKERN_API int peftkern_isa_available(int isa);
// The name of an instruction set; null if there is none with this number.
PEFTKERN_API const char* peftkern_isa_name(int isa);
// The instruction set that AUTO selects.
PEFTKERN_API int peftkern_isa_default(int dtype);

PEFTKERN_API int peftkern_prefix_attention(const peftkern_attention* args);
PEFTKERN_API int peftkern_prefix_attention_backward(const peftkern_attention_backward* args);
PEFTKERN_API int peftkern_soft_prompt_embedding(const peftkern_embedding* args);
PEFTKERN_API int peftkern_soft_prompt_embedding_backward(const peftkern_embedding_backward* args);

// One block of Philox4x32-10, for known-answer tests.
PEFTKERN_API void peftkern_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

// libpeftkern_cuda: pointers are device pointers, dtypes fp16 and bf16, head_dim a multiple of 8 up to 256 and
// value_dim the same, and the prefix has q's dtype. Calls queue work on `stream` of `device` and do not wait for it.
// Pointers, and strides in bytes, are multiples of 16. dropout_p must be 0; `bias` and `gate` must be null in calls
// that read the sequence. `gate` holds the gate's tanh. `isa` and `num_threads` are ignored.
//
// `prefix_start` says what prefix_ids of a packed call holds, if the caller knows it: -1 for the sequences before that
// row, 0 for those from it on, of a bank of one prefix. Kernels that read only the prefix then leave earlier rows alone
// and need not tell sequences apart. -1: unknown.
typedef struct peftkern_cuda_attention {
  peftkern_attention attention;
  const void* part_out;   // [batch, num_heads, q_len, head_dim]: attention over the sequence alone; may be `out`
  const float* part_lse;  // [batch, num_heads, q_len], natural logarithm; may be `lse`
  int64_t part_out_stride[3], part_lse_stride[3];
  void* workspace;  // peftkern_cuda_split_workspace_size bytes, for few rows and many keys; null: one kernel
  int64_t workspace_size;
  int64_t prefix_start;
  int64_t device;
  void* stream;
} peftkern_cuda_attention;

typedef struct peftkern_cuda_attention_backward {
  peftkern_attention_backward backward;
  float* delta;     // [batch, num_heads, q_len], contiguous: rowsum(out * dout) - dlse, or memory for it
  void* workspace;  // peftkern_cuda_workspace_size bytes
  int64_t workspace_size;
  int64_t delta_is_given;
  int64_t prefix_start;
  int64_t device;
  void* stream;
} peftkern_cuda_attention_backward;

// out_k[b] = [prefix_k | k[b]] and out_v[b] = [prefix_v | v[b]], in one launch. prefix_dtype may be fp32.
typedef struct peftkern_cuda_concat_args {
  const void *k, *v;                // [batch, num_kv_heads, kv_len, head_dim]
  const void *prefix_k, *prefix_v;  // [bank_size, num_kv_heads, prefix_len, head_dim]
  const void* prefix_ids;           // [batch], contiguous
  void *out_k, *out_v;              // [batch, num_kv_heads, prefix_len + kv_len, head_dim]
  int64_t batch, num_kv_heads, kv_len, head_dim, bank_size, prefix_len;
  int64_t k_stride[3], v_stride[3], prefix_k_stride[3], prefix_v_stride[3], out_k_stride[3], out_v_stride[3];
  int64_t dtype, prefix_dtype, prefix_ids_dtype;
  int64_t device;
  void* stream;
} peftkern_cuda_concat_args;

// dprefix = the sum of the first prefix_len rows of dout over the samples of each prefix. dtype may be fp32.
typedef struct peftkern_cuda_concat_backward_args {
  const void* dout;        // [batch, num_kv_heads, at least prefix_len, head_dim]: the gradient of out_k or out_v
  const void* prefix_ids;  // [batch], contiguous
  float* dprefix;          // [bank_size, num_kv_heads, prefix_len, head_dim], contiguous
  int64_t batch, num_kv_heads, head_dim, bank_size, prefix_len;
  int64_t dout_stride[3], dtype, prefix_ids_dtype;
  int64_t device;
  void* stream;
} peftkern_cuda_concat_backward_args;

// The forward reads only `backward.forward`. `dweight` must be null.
typedef struct peftkern_cuda_embedding {
  peftkern_embedding_backward backward;
  int64_t device;
  void* stream;
} peftkern_cuda_embedding;

PEFTKERN_API int peftkern_cuda_abi_version(void);
PEFTKERN_API const char* peftkern_cuda_error_string(int status);
// The compute capabilities that the library holds code for: "8.0,9.0+PTX".
PEFTKERN_API const char* peftkern_cuda_architectures(void);

// Merges the prefix and the sinks with the attention over the sequence in `part_out` and `part_lse`; writes out and
// lse. k and v are not read. Null parts mean that there is no sequence. A part_lse of +inf or -inf marks a row that saw
// no key.
PEFTKERN_API int peftkern_cuda_merge_prefix(const peftkern_cuda_attention* args);
// Takes the merged `forward.out` and `forward.lse`. Adds the prefix's part to dq; writes dprefix_k, dprefix_v and
// dprefix_bias. dprefix_bias is [num_heads, prefix_len] in a buffer whose size is a multiple of 16 bytes, and needs
// delta_is_given. With a gate, out and lse are those of the prefix alone.
PEFTKERN_API int peftkern_cuda_merge_prefix_backward(const peftkern_cuda_attention_backward* args);
PEFTKERN_API int64_t peftkern_cuda_workspace_size(const peftkern_cuda_attention_backward* args);

// Writes `delta` as the sum of p * (dout . v) over prefix and sequence, less dlse. The sum does not read `out`, so it
// is exact where out is rounded to half precision. With k null, it covers the prefix alone.
PEFTKERN_API int peftkern_cuda_softmax_sums(const peftkern_cuda_attention_backward* args);

// The whole attention, without another library's kernel. The backward writes dq, dk, dv, dprefix_k, dprefix_v and
// dprefix_bias.
PEFTKERN_API int64_t peftkern_cuda_split_workspace_size(const peftkern_cuda_attention* args);
PEFTKERN_API int peftkern_cuda_prefix_attention(const peftkern_cuda_attention* args);
PEFTKERN_API int peftkern_cuda_prefix_attention_backward(const peftkern_cuda_attention_backward* args);

PEFTKERN_API int peftkern_cuda_concat(const peftkern_cuda_concat_args* args);
PEFTKERN_API int peftkern_cuda_concat_backward(const peftkern_cuda_concat_backward_args* args);
PEFTKERN_API int peftkern_cuda_soft_prompt_embedding(const peftkern_cuda_embedding* args);
PEFTKERN_API int peftkern_cuda_soft_prompt_embedding_backward(const peftkern_cuda_embedding* args);

#ifdef __cplusplus
}
#endif
#endif  // PEFTKERN_H_

// y = x W^T for a batch of 9 and more: a matrix product on the tensor cores.
//
// A block owns 128 rows and a slice of the columns. Packed indices and activations stream through
// shared memory; each warp turns the indices of 16 rows into values in registers, in the layout of
// the tensor core's left operand, and multiplies them with all activations of the block. A lane
// meets two rows only, so their tables fit its registers: the high bytes of the values in some, the
// low bytes in others, where byte permutes look up four at once.
//
// The slices' sums go to a workspace; finish_linear adds them in a fixed order, with the sparse part.
#include "bulk_copy.cuh"
#include "dispatch.h"
#include "fragment_table.cuh"

namespace squeezellm_hf::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpLanes;
constexpr int kRows = kWarps * 16;
constexpr int kStageK = 128;
constexpr int kAtomK = 64;  // activations of a 128-byte line
constexpr int kChunkBytes = 16;

// Stages in shared memory, and blocks of a multiprocessor: two times some 100 KB, or one block.
template <int kBatch>
constexpr int kStages = kBatch <= 32    ? 4
                        : kBatch == 128 ? 2
                                        : 3;
constexpr int blocks_per_multiprocessor(int batch) { return batch <= 16 ? 3 : batch <= 128 ? 2 : 1; }

template <int kBits>
struct Packed {
  static constexpr int kRowBytes = kStageK * kBits / 8;
  static constexpr int kRowChunks = kRowBytes / kChunkBytes;
  // Rows whose first words lie in different banks, 16 bytes at a time.
  static constexpr int kRowStride = kBits == 4 ? 80 : 48;
  static constexpr int kWordsPer32 = kBits;  // words that hold 32 indices
};

template <int kBits, int kBatch>
struct alignas(1024) Stage {
  // [64 of k][batch][64 k], the 16-byte chunks of a line permuted by the line's number.
  unsigned char x[kStageK / kAtomK][kBatch][kAtomK * 2];
  unsigned char weights[kRows][Packed<kBits>::kRowStride];
};

// Copies 16 bytes to shared memory in the background; zeros if not `valid`.
__device__ __forceinline__ void copy_chunk(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(valid ? kChunkBytes : 0));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}

__device__ __forceinline__ uint4 load_matrices(uint32_t address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

// products += values x for 16 of k from `k` on; x as in Stage.
template <class T, int kBatch>
__device__ __forceinline__ void multiply_stage(float (&products)[kBatch / 8][4], const uint32_t (&values)[4],
                                               const unsigned char (&x)[kBatch][kAtomK * 2], int k, int lane) {
  // Four 8 x 8 matrices: the columns n to n + 7 and the next 8, each at k and k + 8.
  const int chunk = (k / 8 + lane / 8 % 2) ^ lane % 8;
  const uint32_t address = shared_address(&x[lane / 16 * 8 + lane % 8][chunk * kChunkBytes]);
#pragma unroll
  for (int n = 0; n < kBatch / 16; ++n) {
    const uint4 b = load_matrices(address + n * 16 * kAtomK * 2);
    multiply_accumulate<T>(products[2 * n], values[0], values[1], values[2], values[3], b.x, b.y);
    multiply_accumulate<T>(products[2 * n + 1], values[0], values[1], values[2], values[3], b.z, b.w);
  }
}

template <class T, int kBits, int kBatch>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor(kBatch))
    tensor_core_kernel(const LinearCall call, int stages_per_slice) {
  using P = Packed<kBits>;
  constexpr int kDepth = kStages<kBatch>;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto* stages = reinterpret_cast<Stage<kBits, kBatch>*>(memory);

  const LutWeight& weight = call.weight;
  const int lane = threadIdx.x % kWarpLanes;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / kWarpLanes, 0);
  const int first_row = blockIdx.x * kRows;
  const int last_row = weight.out_features - 1;
  const int first_column = blockIdx.z * kBatch;
  const int first_stage = blockIdx.y * stages_per_slice;
  const int all_stages = (weight.in_features + kStageK - 1) / kStageK;
  const int stage_count = min(stages_per_slice, all_stages - first_stage);

  // A thread copies the same chunks of every stage, of weights and of activations; their addresses
  // move on with the stages, and a chunk beyond the row's end, or of no row, becomes zeros.
  constexpr int kWeightChunks = (kRows * P::kRowChunks + kThreads - 1) / kThreads;
  constexpr int kLineChunks = kStageK / 8;
  constexpr int kXChunks = kBatch * kLineChunks / kThreads;
  constexpr int kXRows = kThreads / kLineChunks;  // between two of a thread's chunks
  static_assert(kXRows % 8 == 0, "a thread's chunks have one place in the permuted lines");
  const uint32_t* weight_source[kWeightChunks];
  uint32_t weight_target[kWeightChunks];
  int weight_words[kWeightChunks];  // left in the row
#pragma unroll
  for (int i = 0; i < kWeightChunks; ++i) {
    const int c = i * kThreads + threadIdx.x;
    const int chunk_row = c / P::kRowChunks;
    const int word = first_stage * (P::kRowBytes / 4) + c % P::kRowChunks * 4;
    weight_source[i] = weight.qweight + min(first_row + chunk_row, last_row) * weight.words_per_row + word;
    weight_words[i] = static_cast<int>(weight.words_per_row) - word;
    weight_target[i] = shared_address(&stages[0].weights[chunk_row % kRows][c % P::kRowChunks * kChunkBytes]);
  }
  const int x_chunk = threadIdx.x % kLineChunks;
  const int x_row = threadIdx.x / kLineChunks;
  const int x_k = first_stage * kStageK + x_chunk * 8;
  const T* x_source = static_cast<const T*>(call.x) + int64_t{first_column + x_row} * weight.in_features + x_k;
  const uint32_t x_target = shared_address(&stages[0].x[x_chunk / 8][x_row][(x_chunk % 8 ^ x_row % 8) * kChunkBytes]);
  int x_left = weight.in_features - x_k;
  const int x_rows_left = call.batch - first_column - x_row;
  auto load_stage = [&](int slot) {
    const uint32_t offset = slot * static_cast<int>(sizeof(Stage<kBits, kBatch>));
#pragma unroll
    for (int i = 0; i < kWeightChunks; ++i) {
      if (kRows * P::kRowChunks % kThreads != 0 && i * kThreads + threadIdx.x >= kRows * P::kRowChunks) break;
      const bool valid = weight_words[i] > 0;
      copy_chunk(weight_target[i] + offset, valid ? weight_source[i] : weight.qweight, valid);
      weight_source[i] += P::kRowBytes / 4;
      weight_words[i] -= P::kRowBytes / 4;
    }
#pragma unroll
    for (int i = 0; i < kXChunks; ++i) {
      const bool valid = x_left > 0 && x_rows_left > i * kXRows;
      const T* source = x_source + int64_t{i * kXRows} * weight.in_features;
      copy_chunk(x_target + offset + i * kXRows * kAtomK * 2, valid ? source : static_cast<const T*>(call.x), valid);
    }
    x_source += kStageK;
    x_left -= kStageK;
  };
#pragma unroll
  for (int s = 0; s < kDepth - 1; ++s) {
    if (s < stage_count) load_stage(s);
    commit_copies();
  }

  const int row = warp * 16 + lane / 4;
  RowTable<kBits> tables[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) tables[h] = load_table<T, kBits>(weight, min(first_row + row + 8 * h, last_row));

  const uint32_t t = lane % 4;
  float products[kBatch / 8][4] = {};
  for (int s = 0; s < stage_count; ++s) {
    wait_for_copies<kDepth - 2>();
    __syncthreads();
    if (s + kDepth - 1 < stage_count) load_stage((s + kDepth - 1) % kDepth);
    commit_copies();
    const Stage<kBits, kBatch>& stage = stages[s % kDepth];
#pragma unroll
    for (int part = 0; part < kStageK / 32; ++part) {
      uint32_t words[2][kBits];
#pragma unroll
      for (int h = 0; h < 2; ++h) load_indices<kBits>(words[h], &stage.weights[row + 8 * h][part * P::kWordsPer32 * 4]);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t values[4];
#pragma unroll
        for (int h = 0; h < 2; ++h)
          look_up<kBits>(tables[h], select_indices<kBits>(words[h], step, t), values[h], values[2 + h]);
        const int k = part * 32 + step * 16;
        multiply_stage<T, kBatch>(products, values, stage.x[k / kAtomK], k % kAtomK, lane);
      }
    }
  }

  float* sums = call.workspace + int64_t{blockIdx.y} * call.batch * weight.out_features;
#pragma unroll
  for (int n = 0; n < kBatch / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int out_row = first_row + row + i / 2 * 8;
      const int column = first_column + n * 8 + lane % 4 * 2 + i % 2;
      if (out_row <= last_row && column < call.batch)
        sums[int64_t{column} * weight.out_features + out_row] = products[n][i];
    }
}

// Activations of the largest block. Beyond, the indices are turned into values once more for each.
constexpr int kMostBatch = 256;

// Slices of the columns that fill the multiprocessors, none of them empty.
struct Slices {
  int count;
  int stages;  // of each but the last
};

Slices slices(const LinearCall& call) {
  const int row_tiles = (call.weight.out_features + kRows - 1) / kRows;
  const int batch_tiles = (call.batch + kMostBatch - 1) / kMostBatch;
  const int stages = (call.weight.in_features + kStageK - 1) / kStageK;
  const int resident = blocks_per_multiprocessor(call.batch) * call.multiprocessors;
  int count = resident / (row_tiles * batch_tiles);
  // A slice shorter than the stages in flight would be all start-up.
  const int most = stages / 4;
  if (count > most) count = most;
  if (count < 1) count = 1;
  const int per_slice = (stages + count - 1) / count;
  return {(stages + per_slice - 1) / per_slice, per_slice};
}

template <class T, int kBits, int kBatch>
cudaError_t launch(const LinearCall& call) {
  if constexpr (kBatch > 128) {
    // Activations of a smaller block where shared memory is short.
    if (kStages<kBatch> * sizeof(Stage<kBits, kBatch>) > static_cast<size_t>(call.shared_memory))
      return launch<T, kBits, 128>(call);
  }
  const auto kernel = tensor_core_kernel<T, kBits, kBatch>;
  constexpr int kSharedBytes = kStages<kBatch> * sizeof(Stage<kBits, kBatch>);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const Slices split = slices(call);
  const dim3 grid((call.weight.out_features + kRows - 1) / kRows, split.count, (call.batch + kBatch - 1) / kBatch);
  kernel<<<grid, kThreads, kSharedBytes, call.stream>>>(call, split.stages);
  return cudaGetLastError();
}

template <class T, int kBits>
cudaError_t launch_batch(const LinearCall& call) {
  if (call.batch <= 16) return launch<T, kBits, 16>(call);
  if (call.batch <= 32) return launch<T, kBits, 32>(call);
  if (call.batch <= 64) return launch<T, kBits, 64>(call);
  if (call.batch <= 128) return launch<T, kBits, 128>(call);
  return launch<T, kBits, kMostBatch>(call);
}

}  // namespace

int64_t linear_slices(const LinearCall& call) { return slices(call).count; }

cudaError_t linear_tensor_core(const LinearCall& call) {
  return dispatch(call,
                  [&](auto type, auto bits) { return launch_batch<typename decltype(type)::Type, bits.value>(call); });
}

}  // namespace squeezellm_hf::cuda

// What becomes of a persistent block's sums: they are left in memory for another block, or, with what others left,
// become y.
#pragma once

#include "dense_stages.cuh"
#include "persistent_schedule.cuh"

namespace squeezellm_hf::cuda::warpgroup {

constexpr int kOutputLines = 16;  // activations that a warpgroup hands to y at a time
// On a warpgroup's way to y: [activation][row], two of them.
using OutputBuffers = unsigned char[2][kOutputLines * kGroupLines * 2];

#ifdef SQUEEZELLM_HF_WGMMA

// By one lane after __syncwarp(): what its warp wrote can be seen by a warp that has waited for the flag.
__device__ __forceinline__ void set_flag(uint32_t* flag) {
  __threadfence();
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}

// By all lanes: around a loop of one the compiler loses sight of what is the same in all lanes, and moves the
// descriptors of the products from ordinary registers at each.
__device__ __forceinline__ void wait_for_flag(const uint32_t* flag) {
  uint32_t set;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(set) : "l"(flag) : "memory");
  } while (!__all_sync(kAllLanes, set != 0));
}

// Four matrices of 8 x 8 16-bit numbers, in a warp's registers as the tensor core leaves sums, column by column to
// shared memory: lane i says where column i % 8 of matrix i / 8 goes.
__device__ __forceinline__ void store_transposed(uint32_t target, const uint32_t (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(pairs[0]),
               "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}

template <class T>
__device__ __forceinline__ uint32_t round_pair(float first, float second) {
  if constexpr (__is_same(T, __half)) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// Eight neighbouring outputs of which `left` exist.
template <class T>
__device__ __forceinline__ void store_rows(T* y, const uint4& values, int left, int out_features) {
  if (out_features % 8 == 0) {
    if (left > 0) *reinterpret_cast<uint4*>(y) = values;
    return;
  }
  const uint32_t words[4] = {values.x, values.y, values.z, values.w};
  auto* target = reinterpret_cast<uint16_t*>(y);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < left) target[i] = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
}

// A thread's sums as they lie in its registers: another block's same thread takes them.
template <class Tile>
__device__ __forceinline__ float4* part_of(const LinearCall& call, const Schedule& schedule, int part) {
  auto* parts = reinterpret_cast<float4*>(static_cast<char*>(call.parts) + flag_bytes(schedule.parts()));
  return parts + int64_t{part} * (Tile::kBatch / 8 * Tile::kProductThreads) + threadIdx.x;
}

__device__ __forceinline__ uint32_t* flag_of(const LinearCall& call, int part) {
  return static_cast<uint32_t*>(call.parts) + part * kFlags + threadIdx.x / kWarpLanes;
}

template <class Tile>
__device__ __forceinline__ void store_part(const LinearCall& call, const Schedule& schedule, int number, int lines,
                                           const typename Tile::Sums& sums) {
  float4* part = part_of<Tile>(call, schedule, number);
#pragma unroll
  for (int n = 0; n < Tile::kBatch / 8; ++n) {
    const float (&v)[4] = sums[n / (Tile::kRightLines / 8)][n % (Tile::kRightLines / 8)];
    if (n * 8 < lines) __stcg(part + n * Tile::kProductThreads, make_float4(v[0], v[1], v[2], v[3]));
  }
  __syncwarp();
  if (threadIdx.x % kWarpLanes == 0) set_flag(flag_of(call, number));
}

template <class Tile>
__device__ __forceinline__ void add_part(const LinearCall& call, const Schedule& schedule, int number, int lines,
                                         typename Tile::Sums& sums) {
  constexpr int kGroup = 8;  // loads on their way
  wait_for_flag(flag_of(call, number));
  const float4* part = part_of<Tile>(call, schedule, number);
#pragma unroll
  for (int first = 0; first < Tile::kBatch / 8; first += kGroup) {
    if (first * 8 >= lines) break;
    float4 loaded[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if ((first + i) * 8 < lines) loaded[i] = __ldcg(part + (first + i) * Tile::kProductThreads);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float (&v)[4] = sums[(first + i) / (Tile::kRightLines / 8)][(first + i) % (Tile::kRightLines / 8)];
      if ((first + i) * 8 < lines) v[0] += loaded[i].x, v[1] += loaded[i].y, v[2] += loaded[i].z, v[3] += loaded[i].w;
    }
  }
}

// A warpgroup's 64 rows of y, 16 activations at a time: rounded, transposed, then 16 bytes a lane and 128 a line.
template <class Tile>
__device__ __forceinline__ void store_tile(const LinearCall& call, OutputBuffers& buffers, int first_row,
                                           int first_batch, const typename Tile::Sums& sums) {
  using T = typename Tile::T;
  constexpr int kLineBytes = kGroupLines * 2;
  constexpr int kLineChunks = kLineBytes / 16;
  const int group = threadIdx.x / kGroupThreads;
  const int thread = threadIdx.x % kGroupThreads;
  const int lane = threadIdx.x % kWarpLanes;
  const int out_features = call.weight.out_features;
  const int row = first_row + group * kGroupLines;
  const int lines = call.batch - first_batch;
  float bias[2] = {};
  if (call.bias != nullptr) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = row + thread / kWarpLanes * 16 + lane / 4 + 8 * h;
      if (i < out_features) bias[h] = load_float(call.bias, call.bias_dtype, i);
    }
  }
  // Of the activation `line`, the rows from 8 `chunk` on. A matrix of eight lines and one chunk is written at a time,
  // and lines are read as they are: no bank is met twice.
  const auto place = [](int line, int chunk) { return line * kLineBytes + (chunk ^ line % kLineChunks) * 16; };
  const uint32_t target =
      shared_address(buffers) + place(lane / 16 * 8 + lane % 8, thread / kWarpLanes * 2 + lane / 8 % 2);
  const int line = thread / kLineChunks;
  const int chunk = thread % kLineChunks;
  const int source = place(line, chunk);
  const int own_row = row + chunk * 8;
  T* y = static_cast<T*>(call.y) + int64_t{first_batch + line} * out_features + own_row;
  // All have read what the tile before left in the buffers. Within a tile, a buffer is written again after the next
  // one's barrier, before which all have read this one.
  synchronize(1 + group, kGroupThreads);
#pragma unroll
  for (int n = 0; n < Tile::kBatch / 8; n += 2) {
    if (n * 8 >= lines) break;
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int h = i % 2;
      const float* v = sums[(n + i / 2) / (Tile::kRightLines / 8)][(n + i / 2) % (Tile::kRightLines / 8)] + 2 * h;
      pairs[i] = round_pair<T>(v[0] + bias[h], v[1] + bias[h]);
    }
    constexpr uint32_t kBufferBytes = sizeof(buffers[0]);
    store_transposed(target + n / 2 % 2 * kBufferBytes, pairs);
    synchronize(1 + group, kGroupThreads);
    const uint4 values = *reinterpret_cast<const uint4*>(buffers[n / 2 % 2] + source);
    if (n * 8 + line < lines)
      store_rows(y + int64_t{n} * 8 * out_features, values, out_features - own_row, out_features);
  }
}

#endif

}  // namespace squeezellm_hf::cuda::warpgroup

// y = x W^T for small batches on compute capability 9.0: the weights stream through shared memory.
//
// One block a multiprocessor, whose warps have three duties:
//  - one thread orders copies of packed rows into a ring of stages;
//  - kWarps warps turn indices into values and multiply, a unit of the columns of 16 rows at a time. Two
//    neighbouring indices select one 32-bit entry of a table of all pairs of the row's values; in the
//    tensor core's layout lane l meets the rows l / 4 and l / 4 + 8 only, so that four copies of every
//    table give each lane a bank of its own;
//  - kServiceWarps warps fill the next tile's tables, multiply the sparse part, add the warps' sums and
//    write y, while the others go on.
// They meet on barriers in shared memory only. x stays in shared memory.
#include "dispatch.h"
#include "streamed_sparse.cuh"
#include "streamed_tables.cuh"

namespace squeezellm_hf::cuda {
namespace streamed {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// All copies, for all tiles of the block: by one thread, whose addresses are thereby the same for its warp.
template <class T, int kBits, int kBatch, int kBuffers>
__device__ void order_copies(Shared<T, kBits, kBatch, kBuffers>& shared, unsigned char* ring,
                             const CUtensorMap& weights, const Plan& plan, int tiles) {
  using U = Unit<kBits>;
  Slot slot{0};
  int early = kEarlyStages;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for (int stage = 0; stage < plan.stages; ++stage) {
      // x must not queue behind a whole ring.
      if (early-- == 0) wait(shared.x_full, 0);
      wait(shared.empty[slot.index], slot.parity ^ 1);
      unsigned char* target = ring + slot.index * U::kSlotBytes;
      uint64_t& full = shared.full[slot.index];
      arrive_expecting(full, U::kSlotBytes);
#pragma unroll
      for (int box = 0; box < U::kStageBytes / kBoxRowBytes; ++box) {
        const int byte = stage * U::kStageBytes + box * kBoxRowBytes;
        copy_tile(target + box * kBoxBytes, weights, byte / 4, tile * kRows, full);
      }
      slot.advance(1, plan.ring);
    }
  }
}

// The sums of all warps, the bias and y, for one tile: by the first threads of some service warps.
template <class T, int kBatch>
__device__ void write_y(const float (&sums)[kSumWarps][kBatch][kRows], const LinearCall& call, int tile, int thread) {
  const int n = thread / kRows;
  const int row = tile * kRows + thread % kRows;
  if (n >= call.batch || row >= call.weight.out_features) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += sums[w][n][thread % kRows];
  if (call.weight.crow_indices != nullptr)
#pragma unroll
    for (int w = kWarps; w < kSumWarps; ++w) sum += sums[w][n][thread % kRows];
  if (call.bias != nullptr) sum += load_float(call.bias, call.bias_dtype, row);
  static_cast<T*>(call.y)[int64_t{n} * call.weight.out_features + row] = from_float<T>(sum);
}

// The duties of the service warps, for all tiles of the block.
template <class T, int kBits, int kBatch, int kBuffers>
__device__ void serve(Shared<T, kBits, kBatch, kBuffers>& shared, const LinearCall& call, const unsigned char* x,
                      const Plan& plan, int tiles, int warp, int lane) {
  const LutWeight& weight = call.weight;
  const bool has_sparse = weight.crow_indices != nullptr;
  const int step = gridDim.x;
  const int first = blockIdx.x;
  TablePart<kBits> tables;
  SparsePart<T, kBatch> sparse{call, x, plan.x_stride, warp, lane};
  load_tables<T>(tables, weight, first, warp, lane);
  if (has_sparse) sparse.load_rows(first);
  fill_tables(shared, tables, weight, 0, 0, warp, lane);
  load_tables<T>(tables, weight, first + step, warp, lane);
  if (has_sparse) {
    sparse.load_first();
    sparse.load_rows(first + step);
  }
  wait(shared.x_full, 0);
  wait_for_previous_kernel();  // whose memory y may be

  int count = 0;
  for (int tile = first; tile < tiles; tile += step, ++count) {
    const int buffer = count % kSumBuffers;
    const uint32_t parity = count / kSumBuffers & 1;
    auto prepare_tables = [&] {
      if (tile + step < tiles)
        fill_tables(shared, tables, weight, (count + 1) % kBuffers, (count + 1) / kBuffers & 1, warp, lane);
      load_tables<T>(tables, weight, tile + 2 * step, warp, lane);
    };
    // One buffer is free only when all warps are through with this tile.
    if (kBuffers > 1) prepare_tables();
    if (has_sparse) {
      wait(shared.sums_empty[buffer], parity ^ 1);
      sparse.multiply(shared.sums[buffer][kWarps + warp]);
      __syncwarp();
      if (lane < kArrivingLanes) arrive(shared.sums_full[buffer]);
      sparse.load_first();
      sparse.load_rows(tile + 2 * step);
    }
    if (kBuffers == 1) prepare_tables();
    // The warps take turns at the end of a tile.
    const int turn = (warp + count) % kServiceWarps;
    if (turn < kFinishWarps<kBatch>) {
      // Only once the buffer's last tile is written does the parity tell this tile's phase from that one's: no
      // tables are filled for a last tile, which would have held this warp back until then.
      wait(shared.sums_empty[buffer], parity ^ 1);
      wait(shared.sums_full[buffer], parity);
      write_y<T, kBatch>(shared.sums[buffer], call, tile, turn * kWarpLanes + lane);
      __syncwarp();
      if (lane < kArrivingLanes) arrive(shared.sums_empty[buffer]);
    }
  }
}

// x into shared memory by the consuming warps, zeros beyond its end.
template <class T, int kBits>
__device__ void load_x(unsigned char* x, uint64_t& x_full, const LinearCall& call, const Plan& plan) {
  const int pieces = call.weight.in_features / 8;
  const int padded_pieces = plan.stages * Unit<kBits>::kStageWeights / 8;
  wait_for_previous_kernel();
  for (int n = 0; n < call.batch; ++n) {
    const auto* source =
        reinterpret_cast<const uint4*>(static_cast<const T*>(call.x) + int64_t{n} * call.weight.in_features);
#pragma unroll 4
    for (int i = threadIdx.x; i < padded_pieces; i += kWarps * kWarpLanes)
      *reinterpret_cast<uint4*>(x + n * plan.x_stride + x_piece(i) * 16) =
          i < pieces ? load_uncached(source + i) : make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
  if (threadIdx.x % kWarpLanes < kArrivingLanes) arrive(x_full);
  wait(x_full, 0);
}

template <int kBytes>
__device__ __forceinline__ void load_words(uint32_t* words, const unsigned char* source) {
  if constexpr (kBytes == 16) {
    const uint4 v = *reinterpret_cast<const uint4*>(source);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(source);
    words[0] = v.x, words[1] = v.y;
  }
}

// The duties of a consuming warp, for all tiles of the block.
template <class T, int kBits, int kBatch, int kBuffers>
__device__ void multiply_dense(Shared<T, kBits, kBatch, kBuffers>& shared, const unsigned char* ring,
                               const unsigned char* x, const LinearCall& call, const Plan& plan, int tiles, int warp,
                               int lane) {
  using U = Unit<kBits>;
  // With fewer than 8 columns each of the tensor core's takes every kSlices-th group of a lane's weights
  // and zeros for the others, which its registers keep holding: the sums of the columns are added.
  constexpr int kSlices = 8 / kBatch;
  constexpr int kLoads = (U::kGroups + kSlices - 1) / kSlices;
  const int unit = warp % kStageWarps;
  const int column = lane / 4 % kBatch;
  const int slice = column < call.batch ? lane / 4 / kBatch : -1;
  int word_offsets[U::kLaneLoads];
#pragma unroll
  for (int i = 0; i < U::kLaneLoads; ++i)
    word_offsets[i] =
        box_offset(tile_row<kBits>(lane / 4), unit * U::kBytes + (lane % 4 * U::kLaneLoads + i) * U::kLoadBytes);
  const int first_piece = (unit * U::kWeights + lane % 4 * U::kLaneWeights) / 8 + max(slice, 0);
  const unsigned char* lane_x[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) lane_x[i] = x + column * plan.x_stride + x_piece(first_piece + i * kSlices) * 16;
  uint4 activations[U::kGroups] = {};
  const auto* memory = reinterpret_cast<const unsigned char*>(&shared);

  Slot slot{warp / kStageWarps};
  int stage = slot.index;
  int count = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++count) {
    const int table = count % kBuffers;
    const int buffer = count % kSumBuffers;
    const uint32_t parity = count / kSumBuffers & 1;
    const uint32_t base = lane * 4 + (kBits == 2 ? 0 : table * static_cast<int>(sizeof(shared.tables[0])));
    const uint32_t nibbles_base = table * 0x10101010u;
    wait(shared.tables_full[table], count / kBuffers & 1);
    constexpr int kSums = 2;  // in turn, so that a product need not wait for the one before it
    float products[kSums][4] = {};
    for (; stage < plan.stages; stage += kStageStride) {
      wait(shared.full[slot.index], slot.parity);
      const unsigned char* source = ring + slot.index * U::kSlotBytes;
      uint32_t words[2][U::kLaneWords];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < U::kLaneLoads; ++i)
          load_words<U::kLoadBytes>(words[h] + i * U::kLoadBytes / 4, source + h * 8 * kBoxRowBytes + word_offsets[i]);
      __syncwarp();
      if (lane < kArrivingLanes) arrive(shared.empty[slot.index]);
      const int x_offset = stage * U::kStageWeights * 2;
#pragma unroll
      for (int i = 0; i < U::kGroups; ++i)
        if (slice == i % kSlices) activations[i] = *reinterpret_cast<const uint4*>(lane_x[i / kSlices] + x_offset);
#pragma unroll
      for (int i = 0; i < U::kGroups; ++i) {
        const uint4& b = activations[i];
        uint32_t pairs[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t offset = pair_offset<kBits>(words[h], 4 * i + j, base, nibbles_base);
            pairs[h][j] = *reinterpret_cast<const uint32_t*>(memory + h * (kEntryBytes / 2) + offset);
          }
        multiply_accumulate<T>(products[0], pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], b.x, b.y);
        multiply_accumulate<T>(products[1], pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3], b.z, b.w);
      }
      slot.advance(kStageStride, plan.ring);
    }
    stage -= plan.stages;
    __syncwarp();
    if (lane < kArrivingLanes) arrive(shared.tables_empty[table]);

    // A warp's sums over its columns' slices.
    wait(shared.sums_empty[buffer], parity ^ 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float even = products[0][2 * h] + products[1][2 * h];
      float odd = products[0][2 * h + 1] + products[1][2 * h + 1];
      if (kBatch == 1) even += odd;
#pragma unroll
      for (int distance = 2; distance * 2 >= (kBatch > 2 ? kBatch : 2) && kBatch < 8; distance /= 2) {
        even += __shfl_xor_sync(0xffffffff, even, distance);
        odd += __shfl_xor_sync(0xffffffff, odd, distance);
      }
      const int n = lane % 4 * 2;
      const int row = h * 8 + tile_row<kBits>(lane / 4);
      if (n < kBatch) shared.sums[buffer][warp][n][row] = even;
      if (n + 1 < kBatch) shared.sums[buffer][warp][n + 1][row] = odd;
    }
    __syncwarp();
    if (lane < kArrivingLanes) arrive(shared.sums_full[buffer]);
  }
}

template <class T, int kBits, int kBatch, int kBuffers>
__device__ void run_block(unsigned char* memory, const LinearCall& call, const CUtensorMap& weights, const Plan& plan) {
  auto& shared = *reinterpret_cast<Shared<T, kBits, kBatch, kBuffers>*>(memory);
  unsigned char* x = memory + sizeof(shared);
  unsigned char* ring = memory + ring_offset(sizeof(shared) + kBatch * plan.x_stride);
  const int tiles = (call.weight.out_features + kRows - 1) / kRows;
  const int lane = threadIdx.x % kWarpLanes;
  // The shuffle tells the compiler that a warp's lanes agree on it.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / kWarpLanes, 0);

  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.ring; ++i) {
      initialize_barrier(shared.full[i], 1);
      initialize_barrier(shared.empty[i], kStageWarps * kArrivingLanes);
    }
    for (int i = 0; i < kBuffers; ++i) {
      initialize_barrier(shared.tables_full[i], kServiceWarps * kArrivingLanes);
      initialize_barrier(shared.tables_empty[i], kWarps * kArrivingLanes);
    }
    for (int i = 0; i < kSumBuffers; ++i) {
      const int sum_warps = kWarps + (call.weight.crow_indices != nullptr ? kServiceWarps : 0);
      initialize_barrier(shared.sums_full[i], sum_warps * kArrivingLanes);
      initialize_barrier(shared.sums_empty[i], kFinishWarps<kBatch> * kArrivingLanes);
    }
    initialize_barrier(shared.x_full, kWarps * kArrivingLanes);
    fence_barriers();
  }
  __syncthreads();
  // The next kernel may start where this one's blocks have ended; until the previous one is complete,
  // only weights are read.
  allow_next_kernel();
  if (warp < kWarps) {
    load_x<T, kBits>(x, shared.x_full, call, plan);
    multiply_dense<T, kBits, kBatch, kBuffers>(shared, ring, x, call, plan, tiles, warp, lane);
  } else if (warp < kWarps + kServiceWarps) {
    set_registers<kServiceRegisters, true>();
    serve<T, kBits, kBatch, kBuffers>(shared, call, x, plan, tiles, warp - kWarps, lane);
  } else {
    set_registers<kCopyRegisters, false>();
    if (warp == kWarps + kServiceWarps && elect_lane())
      order_copies<T, kBits, kBatch, kBuffers>(shared, ring, weights, plan, tiles);
  }
}

#endif

template <class T, int kBits, int kBatch, int kBuffers>
__global__ void __launch_bounds__(kThreads, 1)
    streamed_kernel(const LinearCall call, const __grid_constant__ CUtensorMap weights, const Plan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char memory[];
  run_block<T, kBits, kBatch, kBuffers>(memory, call, weights, plan);
#endif
}

// The ring is empty where x does not fit.
template <class T, int kBits, int kBatch, int kBuffers>
Plan make_plan(const LinearCall& call) {
  using U = Unit<kBits>;
  Plan plan{};
  plan.stages = (call.weight.in_features + U::kStageWeights - 1) / U::kStageWeights;
  // Between columns of x: lest the lanes of a load meet in a bank.
  const int64_t x_stride = int64_t{plan.stages} * U::kStageWeights * 2 + (kBatch > 1 ? 128 / kBatch : 0);
  const int64_t used = sizeof(Shared<T, kBits, kBatch, kBuffers>) + kBatch * x_stride;
  const int64_t room = call.shared_memory - (used + 1023) / 1024 * 1024;
  if (room < 0) return plan;
  plan.x_stride = static_cast<int>(x_stride);
  plan.ring = static_cast<int>(room / U::kSlotBytes);
  if (plan.ring > kMaxStages) plan.ring = kMaxStages;
  plan.ring -= plan.ring % kStageStride;
  return plan;
}

template <class T, int kBits, int kBatch, int kBuffers>
cudaError_t launch(const LinearCall& call, const Plan& plan) {
  const auto kernel = streamed_kernel<T, kBits, kBatch, kBuffers>;
  const int bytes = call.shared_memory;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const LutWeight& weight = call.weight;
  CUtensorMap weights;
  const cudaError_t mapped =
      make_tensor_map({CU_TENSOR_MAP_DATA_TYPE_INT32, weight.qweight, static_cast<uint64_t>(weight.words_per_row),
                       static_cast<uint64_t>(weight.out_features), static_cast<uint64_t>(weight.words_per_row) * 4,
                       kBoxRowBytes / 4, kRows, CU_TENSOR_MAP_SWIZZLE_128B},
                      weights);
  if (mapped != cudaSuccess) return mapped;
  const int tiles = (weight.out_features + kRows - 1) / kRows;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = tiles < call.multiprocessors ? tiles : call.multiprocessors;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = call.stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, call, weights, plan);
}

template <class T, int kBits, int kBatch>
cudaError_t launch(const LinearCall& call) {
  const Plan plan = make_plan<T, kBits, kBatch, 2>(call);
  if (plan.ring >= kLeastRing) return launch<T, kBits, kBatch, 2>(call, plan);
  if constexpr (kBits == 4) {
    const Plan one = make_plan<T, kBits, kBatch, 1>(call);
    if (one.ring >= kLeastRing) return launch<T, kBits, kBatch, 1>(call, one);
  }
  return linear_small_batch(call);
}

template <class T, int kBits>
cudaError_t launch_batch(const LinearCall& call) {
  if (call.batch == 1) return launch<T, kBits, 1>(call);
  if (call.batch == 2) return launch<T, kBits, 2>(call);
  if (call.batch <= 4) return launch<T, kBits, 4>(call);
  return launch<T, kBits, 8>(call);
}

}  // namespace
}  // namespace streamed

bool can_stream() {
  static const bool compiled = [] {
    cudaFuncAttributes attributes;
    const auto kernel = streamed::streamed_kernel<__half, 4, 1, 2>;
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  }();
  return compiled;
}

cudaError_t linear_streamed(const LinearCall& call) {
  return dispatch(call, [&](auto type, auto bits) {
    return streamed::launch_batch<typename decltype(type)::Type, bits.value>(call);
  });
}

}  // namespace squeezellm_hf::cuda

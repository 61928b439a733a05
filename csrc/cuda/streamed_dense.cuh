// Look-ups and products in linear_streamed.
#pragma once

#include "streamed_input.cuh"
#include "streamed_weights.cuh"

namespace squeezellm_hf::cuda::streamed {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// x into shared memory by the looking-up warps, zeros beyond its end.
template <class T, int kBits, int kBatch, int kWarps, class Weights>
__device__ void load_x(unsigned char* x, Shared<T, kBits, kBatch, kWarps>& shared, Weights weights, const Plan& plan) {
  const LinearCall& call = weights.call;
  const int pieces = call.weight.in_features / 8;
  const int padded_pieces = plan.stages * Unit<kBits>::kStageWeights / 8;
  if constexpr (Weights::kFuses) {
    Input<T, kWarps> input(x, shared.squares, call, weights.group.fusion, padded_pieces);
    input.load([&] { arrive_for_warp(shared.x_read); });
  } else {
    wait_for_previous_kernel();
    for (int n = 0; n < call.batch; ++n) {
      const auto* source =
          reinterpret_cast<const uint4*>(static_cast<const T*>(call.x) + int64_t{n} * call.weight.in_features);
#pragma unroll 4
      for (int i = threadIdx.x; i < padded_pieces; i += kWarps * kWarpLanes)
        *reinterpret_cast<uint4*>(x + n * plan.x_stride + x_piece(i) * 16) =
            i < pieces ? load_uncached(source + i) : make_uint4(0, 0, 0, 0);
    }
    arrive_for_warp(shared.x_read);
  }
  arrive_for_warp(shared.x_full);
  wait(shared.x_full, 0);
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

__device__ __forceinline__ void swap(float (&pair)[2]) {
  const float first = pair[0];
  pair[0] = pair[1];
  pair[1] = first;
}

// The duties of a looking-up warp, for all tiles of the block.
template <class T, int kBits, int kBatch, int kWarps>
__device__ void multiply_dense(Shared<T, kBits, kBatch, kWarps>& shared, const unsigned char* ring,
                               const unsigned char* x, const LinearCall& call, const Plan& plan, const Work& work,
                               int warp, int lane) {
  using U = Unit<kBits>;
  constexpr int kStageStride = Duties<kWarps>::kStageStride;
  // Lanes 2 and 3 of every four look up the rows 8 to 15 where the others look up the rows 0 to 7. With up to
  // four columns of x, half of the tensor core's columns have zeros for the ones, the other half for the others, so
  // that either half of its sums belongs to rows of one kind. With eight columns the values change places.
  constexpr bool kHalves = kBatch < 8;
  const int crossed = lane / 2 % 2;
  // A half's columns take every kSlices-th group of a lane's weights each and zeros otherwise, which its registers
  // keep holding: the sums of the columns are added. Groups kHeld apart have a register in turn.
  constexpr int kSlices = kHalves ? 4 / kBatch : 1;
  constexpr int kHeld = 4;
  constexpr int kLoads = U::kGroups / kSlices;
  const int unit = warp % kStageWarps;
  const int column = lane / 4 % kBatch;
  const int part = lane / 4 / kBatch;
  const bool active = column < call.batch && (!kHalves || part % 2 == crossed);
  const int slice = !active ? -1 : kHalves ? part / 2 : 0;
  int word_offsets[U::kLaneLoads];
#pragma unroll
  for (int i = 0; i < U::kLaneLoads; ++i)
    word_offsets[i] = box_offset(tile_row<kBits>(lane / 4) + crossed * 8,
                                 unit * U::kBytes + (lane % 4 * U::kLaneLoads + i) * U::kLoadBytes);
  const int second_rows = crossed ? -8 * kBoxRowBytes : 8 * kBoxRowBytes;
  const int first_piece = (unit * U::kWeights + lane % 4 * U::kLaneWeights) / 8 + max(slice, 0);
  const unsigned char* lane_x[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) lane_x[i] = x + column * plan.x_stride + x_piece(first_piece + i * kSlices) * 16;
  uint4 activations[kHeld] = {};
  const auto* memory = reinterpret_cast<const unsigned char*>(&shared);
  uint32_t words[2][U::kLaneWords];

  Slot slot{warp / kStageWarps};
  int stage = slot.index;
  int left = (work.all_stages() - stage + kStageStride - 1) / kStageStride;  // stages, of all tiles
  const auto read_words = [&] {
    wait(shared.full[slot.index], slot.parity);
    const unsigned char* source = ring + slot.index * U::kSlotBytes;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < U::kLaneLoads; ++i)
        load_words<U::kLoadBytes>(words[h] + i * U::kLoadBytes / 4, source + h * second_rows + word_offsets[i]);
    __syncwarp();
    if (lane < kArrivingLanes) arrive(shared.empty[slot.index]);
    slot.advance(kStageStride, plan.ring);
  };
  if (left > 0) read_words();
  for (int count = 0; count < work.tiles; ++count) {
    const int table = count % kTableBuffers;
    const int buffer = count % kSumBuffers;
    uint32_t base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) base[h] = table_offset(table, 0, lane / 4 + (h ^ crossed) * 8) + lane % 2 * 4;
    wait(shared.tables_full[table], count / kTableBuffers & 1);
    constexpr int kSums = 2;  // in turn, so that a product need not wait for the one before it
    float products[kSums][4] = {};
    const int end_stage = work.end_stage(count);
    for (stage += work.first_stage(count); stage < end_stage; stage += kStageStride) {
      const auto load_activations = [&](int i) {
        if (slice == i % kSlices)
          activations[i % kHeld] = *reinterpret_cast<const uint4*>(lane_x[i / kSlices] + stage * U::kStageWeights * 2);
      };
#pragma unroll
      for (int i = 0; i < kHeld; ++i) load_activations(i);
#pragma unroll
      for (int i = 0; i < U::kGroups; ++i) {
        const uint4 b = activations[i % kHeld];
        uint32_t pairs[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t offset = pair_offset<kBits>(words[h], 4 * i + j, base[h]);
            pairs[h][j] = *reinterpret_cast<const uint32_t*>(memory + offset);
          }
        // The next stage's words come during the last look-ups.
        if (i == U::kGroups - 1 && --left > 0) read_words();
        if (!kHalves && crossed)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t other = pairs[0][j];
            pairs[0][j] = pairs[1][j];
            pairs[1][j] = other;
          }
        multiply_accumulate<T>(products[0], pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], b.x, b.y);
        multiply_accumulate<T>(products[1], pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3], b.z, b.w);
        if (i + kHeld < U::kGroups) load_activations(i + kHeld);
      }
    }
    stage -= end_stage;
    __syncwarp();
    if (lane < kArrivingLanes) arrive(shared.tables_empty[table]);

    // A warp's sums over its columns' slices.
    wait(shared.sums_empty[buffer], (count / kSumBuffers & 1) ^ 1);
    float even[2];
    float odd[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      even[h] = products[0][2 * h] + products[1][2 * h];
      odd[h] = products[0][2 * h + 1] + products[1][2 * h + 1];
    }
    if (kHalves) {
      if (kBatch == 1 || (lane & kBatch / 2)) swap(odd);
      if (kBatch > 1 && (lane & kBatch / 2)) swap(even);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (kBatch == 1) even[h] += odd[h];
#pragma unroll
      for (int distance = 2; distance * 2 >= (kBatch > 2 ? kBatch : 2) && kBatch < 8; distance /= 2) {
        even[h] += __shfl_xor_sync(0xffffffff, even[h], distance);
        odd[h] += __shfl_xor_sync(0xffffffff, odd[h], distance);
      }
      const int n = lane % 4 * 2;
      const int row = tile_row<kBits>(h * 8 + lane / 4);
      if (n < kBatch) shared.sums[buffer][warp][n][row] = even[h];
      if (n + 1 < kBatch) shared.sums[buffer][warp][n + 1][row] = odd[h];
    }
    __syncwarp();
    if (lane < kArrivingLanes) arrive(shared.sums_full[buffer]);
  }
}

#endif

}  // namespace squeezellm_hf::cuda::streamed

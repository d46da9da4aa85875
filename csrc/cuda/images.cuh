// The images of one kind along its feature rows, found by their cumulated sizes.
#pragma once

#include "../cpu/batch.h"
#include "../rows.h"

namespace vlm_fuse::cuda {

// A kind as kernels take it. Sizes and counts are cumulated on the device (scan.cuh).
struct CountedKind {
  Kind given;
  int64_t limit;        // rows whose numbers fit source_index
  int64_t* image_ends;  // where sizes are listed
  int64_t* count_ends;  // where counts are given

  VLM_FUSE_HD bool each() const { return given.rows_each >= 0; }
};

// How many of `count` ascending numbers are below `value`, or not above it.
template <bool kEqualToo>
VLM_FUSE_HD int64_t numbers_below(const int64_t* numbers, int64_t count, int64_t value) {
  int64_t low = 0, high = count > 0 ? count : 0;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const bool below = kEqualToo ? numbers[middle] <= value : numbers[middle] < value;
    if (below)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Row / size for sizes of images, none of which has more than 2^31 rows.
VLM_FUSE_HD int64_t images_in(int64_t row, int64_t size) {
  const uint32_t capped = row < UINT32_MAX ? static_cast<uint32_t>(row) : UINT32_MAX;
  return capped / static_cast<uint32_t>(size);
}

VLM_FUSE_HD int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }

// Images that end at or before a row: the number of the image that holds the row, the number of images where none does.
VLM_FUSE_HD int64_t images_ending(const CountedKind& kind, int64_t row) {
  if (kind.given.images <= 0 || row < 0) return 0;
  if (!kind.each()) return numbers_below<true>(kind.image_ends, kind.given.images, row);
  if (kind.given.rows_each == 0) return kind.given.images;
  return at_most(images_in(row, kind.given.rows_each), kind.given.images);
}

// Images that begin before a row.
VLM_FUSE_HD int64_t images_beginning(const CountedKind& kind, int64_t row) {
  if (kind.given.images <= 0 || row <= 0) return 0;
  if (!kind.each()) return 1 + numbers_below<false>(kind.image_ends, kind.given.images - 1, row);
  if (kind.given.rows_each == 0) return kind.given.images;
  return at_most(1 + images_in(row - 1, kind.given.rows_each), kind.given.images);
}

// The first row of an image; `image` may be the number of images.
VLM_FUSE_HD int64_t image_start(const CountedKind& kind, int64_t image) {
  if (image <= 0) return 0;
  return kind.each() ? image * kind.given.rows_each : kind.image_ends[image - 1];
}

// Whether a row is the first of all, or follows the last one of an image.
VLM_FUSE_HD bool is_border(const CountedKind& kind, int64_t row) {
  if (row == 0) return true;
  const int64_t ended = images_ending(kind, row);
  return ended > 0 && image_start(kind, ended) == row;
}

// Rows of a kind.
struct KindRows {
  int64_t first;
  int64_t count;
};

// The image of a placeholder under "expand", and its rows; none where there is no such image, or its rows are not
// there.
struct ExpandedImage {
  int64_t image;
  KindRows rows;
};

// `ordinal`: placeholders of the kind before this one, `inside`: those in its sample.
VLM_FUSE_HD ExpandedImage expanded(const CountedKind& kind, bool counted, int64_t sample, int64_t ordinal,
                                   int64_t inside) {
  int64_t image = ordinal, limit = kind.limit;
  if (counted) {
    image = images_beginning(kind, sample > 0 ? kind.count_ends[sample - 1] : 0) + inside;
    limit = at_most(limit, kind.count_ends[sample]);
  }
  if (image >= kind.given.images) return {image, {0, 0}};
  const int64_t begin = image_start(kind, image), end = image_start(kind, image + 1);
  return {image, {begin, end <= limit ? end - begin : 0}};
}

// The rows of the whole images that a sample has in front under "images_first".
VLM_FUSE_HD KindRows rows_in_front(const CountedKind& kind, bool counted, int64_t sample) {
  int64_t first = sample, last = sample + 1, limit = kind.limit;
  if (counted) {
    first = images_beginning(kind, sample > 0 ? kind.count_ends[sample - 1] : 0);
    last = images_ending(kind, at_most(limit, kind.count_ends[sample]));
  }
  last = at_most(last, kind.given.images);
  if (first >= last) return {0, 0};
  const int64_t begin = image_start(kind, first), end = image_start(kind, last);
  return {begin, end <= limit ? end - begin : 0};
}

}  // namespace vlm_fuse::cuda

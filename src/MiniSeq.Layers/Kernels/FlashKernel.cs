using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;
using static TorchSharp.torch;

namespace MiniSeq.Layers.Kernels;

/// <summary>
/// Attention of one document in bfloat16 on the CPU: tiles of scores with a running softmax (Dao et al. 2022, arXiv 2205.14135, algorithms 1
/// and 4) over <see cref="MatrixKernel"/>, every tile in the cache of its core, tiles that no query sees left out. With a sliding window and capped scores where asked.
/// </summary>
/// <remarks>
/// q [n, Hq, D] are the last n of the rows of k and v [T, Hkv, D]; D a multiple of 16. Scores, softmax and all sums are float32; exponents count in
/// powers of two. <see cref="Attention"/> has checked that shapes and types fit. Heads that share keys go together, so that these are packed once for all of them.
/// </remarks>
internal sealed unsafe class FlashKernel
{
    private const int Queries = 128;     // rows of a tile
    private const int Together = 4;      // such tiles, of heads or of rows, that use one block of packed keys
    private const int FewestQueries = 16; // fewer would leave most of a tile empty
    private const float Unseen = -1e30f; // finite, so that a row without a visible key in a tile stays a number

    private readonly int _heads, _keyHeads, _width, _group, _headsTogether, _rowBlocks, _keys;
    private readonly long _n, _length, _window;
    private readonly float _scale, _cap;
    private readonly long _queryStride, _keyStride;

    public FlashKernel(Tensor q, Tensor k, double scale, long? window, double? softcap)
    {
        (_n, _heads, _width) = (q.size(0), (int)q.size(1), (int)q.size(2));
        (_length, _keyHeads) = (k.size(0), (int)k.size(1));
        (_scale, _window, _cap) = ((float)scale, window ?? long.MaxValue / 2, (float)(softcap ?? 0));
        (_queryStride, _keyStride) = ((long)_heads * _width, (long)_keyHeads * _width);
        _group = _heads / _keyHeads;
        _headsTogether = Enumerable.Range(1, Together).Last(t => _group % t == 0);
        _rowBlocks = Together / _headsTogether;
        _keys = _width <= 64 ? 512 : 256;
    }

    /// <summary>Whether the kernel takes queries like these.</summary>
    public static bool Takes(Tensor q) => MatrixKernel.Takes(q) && Takes(q.size(0), q.size(-1));

    /// <summary>The same of so many queries of a width, where <see cref="MatrixKernel"/> takes their type.</summary>
    public static bool Takes(long queries, long width) => queries >= FewestQueries && width % 16 == 0 && width <= 256;

    /// <summary>Memory of backward beyond its arguments, in bytes.</summary>
    public static long BackwardBytes(long length, int keyHeads, int width)
    {
        int parts = (Workers.Count + keyHeads - 1) / keyHeads;
        long shared = parts > 1 ? 2 * length * keyHeads * width : 0;
        return sizeof(float) * ((Math.Min(Workers.Count, keyHeads * parts) * new BackwardScratch(width, length).Floats) + shared);
    }

    private long QueryTasks => (_n + (_rowBlocks * Queries) - 1) / (_rowBlocks * Queries);

    /// <summary>Output [n, Hq, D] and log-sum-exp [1, Hq, n].</summary>
    public (Tensor Output, Tensor LogSumExp) Forward(Tensor q, Tensor k, Tensor v)
    {
        using var scope = NewDisposeScope();
        (q, k, v) = (q.contiguous(), k.contiguous(), v.contiguous());
        var (output, sums) = (empty_like(q), empty([1, _heads, _n], ScalarType.Float32));
        int workers = Workers.Count, headTasks = _heads / _headsTogether;
        var layout = new ForwardScratch(_width, _keys);
        var scratch = empty([workers, layout.Floats], ScalarType.Float32);
        ushort* pq = (ushort*)MatrixKernel.Pointer(q), pk = (ushort*)MatrixKernel.Pointer(k), pv = (ushort*)MatrixKernel.Pointer(v), po = (ushort*)MatrixKernel.Pointer(output);
        float* ps = (float*)MatrixKernel.Pointer(sums), room = (float*)MatrixKernel.Pointer(scratch);
        long blocks = QueryTasks;
        Workers.Run(workers, checked((int)(headTasks * blocks)), (worker, task) =>
        {
            // The last rows see the most keys: they go first, so that no worker is left with a long task at the end.
            long block = blocks - 1 - (task / headTasks);
            ForwardTask(pq, pk, pv, po, ps, task % headTasks * _headsTogether, block * _rowBlocks * Queries, layout.At(room + (worker * layout.Floats)));
        });
        return (output.MoveToOuterDisposeScope(), sums.MoveToOuterDisposeScope());
    }

    /// <summary>Gradients of q, k and v in the memory of q, k and v.</summary>
    /// <param name="dOutput">dy, [n, Hq, D].</param>
    /// <param name="q">As in forward; contiguous, as k and v.</param>
    /// <param name="k">As in forward.</param>
    /// <param name="v">As in forward.</param>
    /// <param name="delta">Σ dy ⊙ y of each query and head, [n, Hq] float32.</param>
    /// <param name="logSumExp">Forward's.</param>
    /// <remarks>p = exp(s − lse); dv += pᵀ dy; ds = scale p ⊙ (dy vᵀ − Σ dy ⊙ y), through the cap times 1 − (s / cap)²; dq = ds k; dk += dsᵀ q. Tiles are transposed,
    /// [keys, queries]: then only one of the five products needs an operand in another order than it was made. A block of queries is read by one task alone, and keys are
    /// read to the end before their gradients are written.</remarks>
    public void Backward_(Tensor dOutput, Tensor q, Tensor k, Tensor v, Tensor delta, Tensor logSumExp)
    {
        using var scope = NewDisposeScope();
        (dOutput, delta, logSumExp) = (dOutput.contiguous(), delta.contiguous(), logSumExp.contiguous());
        int workers = Workers.Count;
        int parts = (workers + _keyHeads - 1) / _keyHeads; // of a head's queries, where there are fewer heads than threads
        workers = Math.Min(workers, _keyHeads * parts);
        var layout = new BackwardScratch(_width, _length);
        var scratch = empty([workers, layout.Floats], ScalarType.Float32);
        var shared = parts > 1 ? zeros([2, _length, _keyHeads, _width], ScalarType.Float32) : null;
        var x = new BackwardArguments((ushort*)MatrixKernel.Pointer(dOutput), (ushort*)MatrixKernel.Pointer(q), (ushort*)MatrixKernel.Pointer(k), (ushort*)MatrixKernel.Pointer(v),
            (float*)MatrixKernel.Pointer(delta), (float*)MatrixKernel.Pointer(logSumExp));
        float* room = (float*)MatrixKernel.Pointer(scratch), sum = shared is null ? null : (float*)MatrixKernel.Pointer(shared);
        int[] added = new int[_keyHeads]; // parts of each head: one after the other, so that sums do not depend on who is done first
        Workers.Run(workers, _keyHeads * parts, (worker, task) =>
        {
            int head = task % _keyHeads;
            var at = layout.At(room + (worker * layout.Floats));
            BackwardTask(x, head, task / _keyHeads, parts, at);
            if (sum == null)
            {
                Round(at.Dk, x.K, head);
                Round(at.Dv, x.V, head);
                return;
            }
            var wait = new SpinWait();
            while (Volatile.Read(ref added[head]) < task / _keyHeads) wait.SpinOnce(); // tasks begin in order, so the part before is at work
            AddTo(sum, at.Dk, head);
            AddTo(sum + (_length * _keyStride), at.Dv, head);
            Volatile.Write(ref added[head], (task / _keyHeads) + 1);
        });
        if (shared is null) return;
        k.copy_(shared[0]);
        v.copy_(shared[1]);
    }

    private long Position(long row) => _length - _n + row; // of a query among the keys

    private long FirstKey(long position) => Math.Max(0, position - _window + 1);

    // ---- forward

    /// <summary>A worker's memory in forward: one tile of scores, one block of packed keys and values, and what is kept for each tile of queries.</summary>
    private readonly struct ForwardScratch(int width, int keys)
    {
        private int Block => keys * width / 2;

        private int PerTile => (Queries * width) + (Queries * width / 2) + (2 * Queries);

        public long Floats => (Queries * keys) + (2 * Block) + (Together * PerTile);

        public ForwardMemory At(float* room) => new(room, (ushort*)(room + (Queries * keys)), (ushort*)(room + (Queries * keys) + Block), room + (Queries * keys) + (2 * Block), PerTile, width);
    }

    private readonly struct ForwardMemory(float* scores, ushort* keys, ushort* values, float* tiles, int perTile, int width)
    {
        public readonly float* Scores = scores;  // [Queries, keys]; the probabilities take the first half of each row's memory
        public readonly ushort* Keys = keys;     // [D/2, keys, 2]
        public readonly ushort* Values = values; // [keys/2, D, 2]

        public float* Output(int tile) => tiles + (tile * perTile); // [Queries, D]

        public ushort* Q(int tile) => (ushort*)(Output(tile) + (Queries * width)); // [Queries, D]

        public float* Max(int tile) => Output(tile) + (Queries * width) + (Queries * width / 2);

        public float* Sum(int tile) => Max(tile) + Queries;
    }

    private void ForwardTask(ushort* q, ushort* k, ushort* v, ushort* output, float* sums, int firstHead, long firstRow, ForwardMemory at)
    {
        int keyHead = firstHead / _group;
        long lastRow = Math.Min(_n, firstRow + (_rowBlocks * Queries)) - 1;
        for (int tile = 0; tile < Together; tile++)
            if (Tile(tile, firstHead, firstRow) is var (head, row, count) && count > 0)
            {
                Tiles.Copy(q + (row * _queryStride) + ((long)head * _width), _queryStride, count, Queries, _width, at.Q(tile));
                new Span<float>(at.Output(tile), Queries * _width).Clear();
                new Span<float>(at.Max(tile), Queries).Fill(Unseen);
                new Span<float>(at.Sum(tile), Queries).Clear();
            }
        long end = Position(lastRow) + 1;
        for (long from = FirstKey(Position(firstRow)); from < end; from += _keys)
        {
            int length = (int)Math.Min(_keys, end - from), padded = Padded(length);
            Tiles.PackColumns(k + (from * _keyStride) + ((long)keyHead * _width), _keyStride, length, padded, _width, at.Keys);
            Tiles.PackRows(v + (from * _keyStride) + ((long)keyHead * _width), _keyStride, length, padded, _width, at.Values);
            for (int tile = 0; tile < Together; tile++)
                if (Tile(tile, firstHead, firstRow) is var (_, row, count) && count > 0)
                    ForwardTile(at, tile, Position(row), count, from, length, padded);
        }
        for (int tile = 0; tile < Together; tile++)
            if (Tile(tile, firstHead, firstRow) is var (head, row, count) && count > 0)
                for (int i = 0; i < count; i++)
                {
                    float sum = at.Sum(tile)[i];
                    var factor = Vector512.Create(1 / sum);
                    float* from = at.Output(tile) + (i * _width);
                    ushort* to = output + ((row + i) * _queryStride) + ((long)head * _width);
                    for (int c = 0; c < _width; c += 16) VectorMath.Store(Vector512.Load(from + c) * factor, to + c);
                    sums[(head * _n) + row + i] = (at.Max(tile)[i] + MathF.Log2(sum)) * VectorMath.Ln2;
                }
    }

    // A tile of a task: its head, first row, and rows.
    private (int Head, long Row, int Count) Tile(int tile, int firstHead, long firstRow)
    {
        long row = firstRow + (tile / _headsTogether * Queries);
        return (firstHead + (tile % _headsTogether), row, tile / _headsTogether < _rowBlocks ? (int)Math.Clamp(_n - row, 0, Queries) : 0);
    }

    private void ForwardTile(ForwardMemory at, int tile, long first, int count, long from, int length, int padded)
    {
        int seen = (int)Math.Min(length, first + count - from); // by the last row of the tile
        if (seen <= 0 || from + length <= FirstKey(first)) return;
        int used = Padded(seen);
        MatrixKernel.Multiply(Queries, used, _width, at.Q(tile), _width, at.Keys, padded, at.Scores, _keys, add: false);
        for (int i = 0; i < count; i++)
            Softmax(at.Scores + (i * _keys), used, (int)Math.Clamp(FirstKey(first + i) - from, 0, used), (int)Math.Clamp(first + i + 1 - from, 0, length), at.Output(tile) + (i * _width), at.Max(tile) + i, at.Sum(tile) + i);
        if (count < Queries)
            for (int i = count; i < Queries; i++) new Span<float>(at.Scores + (i * _keys), used / 2).Clear();
        MatrixKernel.Multiply(Queries, _width, used, (ushort*)at.Scores, 2 * _keys, at.Values, _width, at.Output(tile), _width, add: true);
    }

    // One row: scores from low to high are seen. They become probabilities under a new maximum, and what was summed under the old one shrinks.
    private void Softmax(float* scores, int used, int low, int high, float* output, float* max, float* sum)
    {
        if (_cap > 0)
        {
            var inside = Vector512.Create(_scale / _cap);
            for (int c = 0; c < used; c += 16) (VectorMath.Tanh(Vector512.Load(scores + c) * inside) * _cap).Store(scores + c);
        }
        float unit = VectorMath.Log2E * (_cap > 0 ? 1 : _scale);
        if (low > 0) new Span<float>(scores, low).Fill(float.NegativeInfinity);
        if (high < used) new Span<float>(scores + high, used - high).Fill(float.NegativeInfinity);
        Vector512<float> most = Vector512.Load(scores), most2 = Vector512.Load(scores + 16);
        for (int c = 32; c < used; c += 32)
        {
            most = Avx512F.Max(most, Vector512.Load(scores + c));
            most2 = Avx512F.Max(most2, Vector512.Load(scores + c + 16));
        }
        float highest = Math.Max(*max, Highest(Avx512F.Max(most, most2)) * unit);
        var (factor, shift) = (Vector512.Create(unit), Vector512.Create(-highest));
        Vector512<float> total = default, total2 = default;
        var to = (ushort*)scores;
        for (int c = 0; c < used; c += 32)
        {
            var p = VectorMath.Exp2(Avx512F.FusedMultiplyAdd(Vector512.Load(scores + c), factor, shift));
            var p2 = VectorMath.Exp2(Avx512F.FusedMultiplyAdd(Vector512.Load(scores + c + 16), factor, shift));
            (total, total2) = (total + p, total2 + p2);
            VectorMath.StoreFast(p, to + c);
            VectorMath.StoreFast(p2, to + c + 16);
        }
        if (highest > *max)
        {
            float shrink = VectorMath.Exp2(*max - highest);
            *sum *= shrink;
            for (int c = 0; c < _width; c += 16) (Vector512.Load(output + c) * shrink).Store(output + c);
            *max = highest;
        }
        *sum += Vector512.Sum(total + total2);
    }

    private static float Highest(Vector512<float> x)
    {
        var half = Avx.Max(x.GetLower(), x.GetUpper());
        var quarter = Sse.Max(half.GetLower(), half.GetUpper());
        return Math.Max(Math.Max(quarter[0], quarter[1]), Math.Max(quarter[2], quarter[3]));
    }

    private static int Padded(int keys) => (keys + 127) / 128 * 128;

    // ---- backward

    private const int BackwardKeys = 256, BackwardTiles = 2;

    private readonly struct BackwardArguments(ushort* dOutput, ushort* q, ushort* k, ushort* v, float* delta, float* sums)
    {
        public readonly ushort* DOutput = dOutput, Q = q, K = k, V = v;
        public readonly float* Delta = delta, Sums = sums;
    }

    /// <summary>A worker's memory in backward: the gradients of one head's keys and values, and tiles.</summary>
    private readonly struct BackwardScratch(int width, long length)
    {
        private long Rows => (length + BackwardKeys - 1) / BackwardKeys * BackwardKeys;

        private const int Tile = BackwardKeys * Queries;

        private int KeyBlock => BackwardKeys * width / 2;

        private int PerTile => (4 * Queries * width / 2) + (width * Queries) + (2 * Queries);

        public long Floats => (2 * Rows * width) + (2 * Tile) + (Tile / 2) + (4 * KeyBlock) + (BackwardTiles * PerTile);

        public BackwardMemory At(float* room)
        {
            float* tiles = room + (2 * Rows * width);
            float* keys = tiles + (2 * Tile) + (Tile / 2);
            return new BackwardMemory(room, room + (Rows * width), Rows * width, tiles, keys, KeyBlock, keys + (4 * KeyBlock), PerTile, width);
        }
    }

    private readonly struct BackwardMemory(float* dk, float* dv, long gradient, float* scores, float* keys, int keyBlock, float* tiles, int perTile, int width)
    {
        public readonly float* Dk = dk, Dv = dv;                        // [rows, D]
        public readonly long Gradient = gradient;                       // numbers of each
        public readonly float* Scores = scores;                         // [BackwardKeys, Queries], then in half of it p
        public readonly float* DScores = scores + (BackwardKeys * Queries);
        public readonly ushort* Packed = (ushort*)(scores + (2 * BackwardKeys * Queries)); // ds [BackwardKeys/2, Queries, 2]
        public readonly ushort* K = (ushort*)keys;                      // [BackwardKeys, D]
        public readonly ushort* V = (ushort*)(keys + keyBlock);
        public readonly ushort* Kt = (ushort*)(keys + (2 * keyBlock));  // [D, BackwardKeys]
        public readonly ushort* Pairs = (ushort*)(keys + (3 * keyBlock));

        public float* Dq(int tile) => tiles + (tile * perTile);         // [D, Queries]

        public float* Lse(int tile) => Dq(tile) + (width * Queries);    // in powers of two

        public float* Along(int tile) => Lse(tile) + Queries;           // Σ dy ⊙ y

        // q and dy [Queries, D], each as right factor of itself and of its transpose
        public ushort* Operand(int tile, int which) => (ushort*)(Along(tile) + Queries) + (which * Queries * width);
    }

    private void BackwardTask(in BackwardArguments x, int keyHead, int part, int parts, BackwardMemory at)
    {
        new Span<float>(at.Dk, checked((int)Math.Min(int.MaxValue, at.Gradient))).Clear();
        new Span<float>(at.Dv, checked((int)Math.Min(int.MaxValue, at.Gradient))).Clear();
        int heads = Math.Min(BackwardTiles, _headsTogether), rowBlocks = BackwardTiles / heads;
        if (_group % heads != 0) (heads, rowBlocks) = (1, BackwardTiles);
        long blocks = (_n + (rowBlocks * Queries) - 1) / (rowBlocks * Queries);
        for (int head = keyHead * _group; head < (keyHead + 1) * _group; head += heads)
            for (long block = part; block < blocks; block += parts)
                BackwardBlock(x, keyHead, head, heads, block * rowBlocks * Queries, rowBlocks, at);
    }

    private void BackwardBlock(in BackwardArguments x, int keyHead, int firstHead, int heads, long firstRow, int rowBlocks, BackwardMemory at)
    {
        long lastRow = Math.Min(_n, firstRow + (rowBlocks * Queries)) - 1, end = Position(lastRow) + 1;
        for (int tile = 0; tile < BackwardTiles; tile++) ReadQueries(x, firstHead + (tile % heads), firstRow + (tile / heads * Queries), at, tile);
        for (long from = FirstKey(Position(firstRow)) / BackwardKeys * BackwardKeys; from < end; from += BackwardKeys)
        {
            int length = (int)Math.Min(BackwardKeys, Math.Min(end, _length) - from);
            long place = (from * _keyStride) + ((long)keyHead * _width);
            Tiles.Copy(x.K + place, _keyStride, length, BackwardKeys, _width, at.K);
            Tiles.Copy(x.V + place, _keyStride, length, BackwardKeys, _width, at.V);
            Tiles.TransposeRows(at.K, _width, BackwardKeys, BackwardKeys, _width, at.Kt, at.Pairs);
            for (int tile = 0; tile < BackwardTiles; tile++)
            {
                long row = firstRow + (tile / heads * Queries);
                BackwardTile(at, tile, Position(row), (int)Math.Clamp(_n - row, 0, Queries), from, length);
            }
        }
        for (int tile = 0; tile < BackwardTiles; tile++) WriteQueries(x, firstHead + (tile % heads), firstRow + (tile / heads * Queries), at, tile);
    }

    private void ReadQueries(in BackwardArguments x, int head, long row, BackwardMemory at, int tile)
    {
        int count = (int)Math.Clamp(_n - row, 0, Queries);
        if (count == 0) return;
        long place = (row * _queryStride) + ((long)head * _width);
        ushort* q = at.Operand(tile, 0), dy = at.Operand(tile, 2), copy = (ushort*)at.Scores;
        foreach (var (from, to) in stackalloc[] { ((nint)(x.Q + place), (nint)q), ((nint)(x.DOutput + place), (nint)dy) })
        {
            Tiles.Copy((ushort*)from, _queryStride, count, Queries, _width, copy);
            Tiles.PackColumns(copy, _width, Queries, Queries, _width, (ushort*)to);
            Tiles.PackRows(copy, _width, Queries, Queries, _width, (ushort*)to + (Queries * _width));
        }
        for (int i = 0; i < Queries; i++)
        {
            at.Lse(tile)[i] = i < count ? x.Sums[(head * _n) + row + i] * VectorMath.Log2E : 0;
            at.Along(tile)[i] = i < count ? x.Delta[((row + i) * _heads) + head] : 0;
        }
        new Span<float>(at.Dq(tile), _width * Queries).Clear();
    }

    private void WriteQueries(in BackwardArguments x, int head, long row, BackwardMemory at, int tile)
    {
        int count = (int)Math.Clamp(_n - row, 0, Queries);
        if (count == 0) return;
        Tiles.Transpose((uint*)at.Dq(tile), Queries, _width, Queries, (uint*)at.Scores, _width);
        for (int i = 0; i < count; i++)
            for (int c = 0; c < _width; c += 16)
                VectorMath.Store(Vector512.Load(at.Scores + (i * _width) + c), x.Q + ((row + i) * _queryStride) + ((long)head * _width) + c);
    }

    private void BackwardTile(BackwardMemory at, int tile, long first, int count, long from, int length)
    {
        if (count == 0 || from > first + count - 1 || from + length <= FirstKey(first)) return;
        int keys = Padded((int)Math.Min(BackwardKeys, first + count - from)); // up to the last that a query of the tile sees
        ushort* qColumns = at.Operand(tile, 0), qRows = at.Operand(tile, 1), dyColumns = at.Operand(tile, 2), dyRows = at.Operand(tile, 3);
        MatrixKernel.Multiply(keys, Queries, _width, at.K, _width, qColumns, Queries, at.Scores, Queries, add: false);   // sᵀ
        MatrixKernel.Multiply(keys, Queries, _width, at.V, _width, dyColumns, Queries, at.DScores, Queries, add: false); // (dy vᵀ)ᵀ
        bool whole = count == Queries && length == BackwardKeys && from + length - 1 <= first && from >= FirstKey(first + Queries - 1);
        for (int r = 0; r < keys; r += 2)
            ScoreGradients(at, tile, r, whole ? (0, Queries) : Seen(first - from - r, r < length ? count : 0), whole ? (0, Queries) : Seen(first - from - r - 1, r + 1 < length ? count : 0));
        MatrixKernel.Multiply(keys, _width, Queries, (ushort*)at.Scores, 2 * Queries, dyRows, _width, at.Dv + (from * _width), _width, add: true);
        MatrixKernel.Multiply(keys, _width, Queries, (ushort*)at.DScores, 2 * Queries, qRows, _width, at.Dk + (from * _width), _width, add: true);
        MatrixKernel.Multiply(_width, Queries, keys, at.Kt, BackwardKeys, at.Packed, Queries, at.Dq(tile), Queries, add: true);
    }

    // Which queries of a tile see a key: from low to high. The distance is that of the tile's first query to it.
    private (int Low, int High) Seen(long distance, int count) => ((int)Math.Clamp(-distance, 0, Queries), (int)Math.Clamp(Math.Min(count, _window - distance), 0, Queries));

    // Two keys against all queries: p and ds take the first half of their row's memory, and ds goes to the packed pairs, too.
    private void ScoreGradients(in BackwardMemory at, int tile, int key, (int Low, int High) first, (int Low, int High) second)
    {
        float* s = at.Scores + (key * Queries), ds = at.DScores + (key * Queries), lse = at.Lse(tile), along = at.Along(tile);
        uint* pairs = (uint*)at.Packed + (key / 2 * Queries);
        var numbers = new Factors(_scale, _cap);
        for (int c = 0; c < Queries; c += 16)
        {
            var (shift, delta) = (Vector512.Load(lse + c), Vector512.Load(along + c));
            var low = numbers.ScoreGradient(s, ds, c, shift, delta, first);
            var high = numbers.ScoreGradient(s + Queries, ds + Queries, c, shift, delta, second);
            (low | (high << 16)).Store(pairs + c);
        }
    }

    private readonly struct Factors(float scale, float cap)
    {
        private readonly Vector512<float> _unit = Vector512.Create(VectorMath.Log2E * (cap > 0 ? cap : scale));
        private readonly Vector512<float> _scale = Vector512.Create(scale);
        private readonly float _inside = cap > 0 ? scale / cap : 0;

        // Queries c.. of one row of keys.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public Vector512<uint> ScoreGradient(float* row, float* dRow, int c, Vector512<float> lse, Vector512<float> along, (int Low, int High) seen)
        {
            var (s, slope) = (Vector512.Load(row + c), _scale);
            if (_inside > 0)
            {
                s = VectorMath.Tanh(s * _inside);
                slope *= Vector512<float>.One - (s * s);
            }
            var p = VectorMath.Exp2(Avx512F.FusedMultiplySubtract(s, _unit, lse));
            if (seen.Low > c || seen.High < c + 16)
            {
                var query = Vector512<int>.Indices + Vector512.Create(c);
                p = Vector512.ConditionalSelect((Vector512.GreaterThanOrEqual(query, Vector512.Create(seen.Low)) & Vector512.LessThan(query, Vector512.Create(seen.High))).AsSingle(), p, default);
            }
            var ds = (Vector512.Load(dRow + c) - along) * p * slope;
            VectorMath.StoreFast(p, (ushort*)row + c);
            var bits = VectorMath.RoundedFast(ds);
            Avx512F.ConvertToVector256UInt16(bits).Store((ushort*)dRow + c);
            return bits;
        }
    }

    private void Round(float* from, ushort* to, int keyHead)
    {
        for (long r = 0; r < _length; r++)
            for (int c = 0; c < _width; c += 16)
                VectorMath.Store(Vector512.Load(from + (r * _width) + c), to + (r * _keyStride) + ((long)keyHead * _width) + c);
    }

    private void AddTo(float* sum, float* from, int keyHead)
    {
        for (long r = 0; r < _length; r++)
            for (int c = 0; c < _width; c += 16)
            {
                float* to = sum + (r * _keyStride) + ((long)keyHead * _width) + c;
                (Vector512.Load(to) + Vector512.Load(from + (r * _width) + c)).Store(to);
            }
    }
}

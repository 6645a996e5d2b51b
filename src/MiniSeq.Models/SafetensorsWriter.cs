using System.Buffers;
using System.Text.Encodings.Web;
using System.Text.Json;
using System.Text.RegularExpressions;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>Writes tensors as safetensors files, in one piece or sharded as Hugging Face does.</summary>
/// <remarks>
/// Files are written under temporary names in the same folder and renamed at the end: an interrupted save leaves the old files whole.
/// Tensors are streamed one after the other; the writer copies a tensor only where it is on another device or not contiguous.
/// </remarks>
public static partial class SafetensorsWriter
{
    private const int Alignment = 8;
    private const int MaxWriteBytes = 1 << 24;
    private static readonly Dictionary<string, string> s_defaultMetadata = new() { ["format"] = "pt" };

    /// <summary>Writes one file.</summary>
    /// <param name="path">The file to create or replace.</param>
    /// <param name="tensors">Names and tensors of any shape; dtypes F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL.</param>
    /// <param name="metadata">Text to keep in the header; <c>{"format": "pt"}</c> if null.</param>
    /// <exception cref="ArgumentException">A name occurs twice or is reserved, or a dtype is not supported.</exception>
    public static void Save(string path, IEnumerable<(string Name, Tensor Tensor)> tensors, IReadOnlyDictionary<string, string>? metadata = null)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        ArgumentNullException.ThrowIfNull(tensors);
        using var files = new PendingFiles();
        Write(files.Add(path), tensors, metadata);
        files.Commit();
    }

    /// <summary>Writes the bytes of one file, as <see cref="Save"/> does.</summary>
    internal static void Write(Stream stream, IEnumerable<(string Name, Tensor Tensor)> tensors, IReadOnlyDictionary<string, string>? metadata = null) =>
        Write(stream, Describe(tensors.Select(TensorSource.Of)), metadata);

    /// <summary>Writes <c>model.safetensors</c>, or where that would exceed <paramref name="maxShardBytes"/>,
    /// <c>model-00001-of-0000N.safetensors</c> and so on with <c>model.safetensors.index.json</c>. Weight files of an earlier save are removed.</summary>
    /// <param name="folder">The folder, created if missing.</param>
    /// <param name="tensors">Names and tensors, as for <see cref="Save"/>; shards are filled in this order.</param>
    /// <param name="maxShardBytes">Bytes of tensor data in one file; a larger tensor gets a file of its own.</param>
    /// <exception cref="ArgumentException">A name occurs twice or is reserved, or a dtype is not supported.</exception>
    public static void SavePretrained(string folder, IReadOnlyList<(string Name, Tensor Tensor)> tensors, long maxShardBytes = 5_000_000_000)
    {
        ArgumentException.ThrowIfNullOrEmpty(folder);
        ArgumentNullException.ThrowIfNull(tensors);
        SavePretrained(folder, tensors.Select(TensorSource.Of), maxShardBytes);
    }

    /// <summary>The same for tensors that are made as they are written, one at a time.</summary>
    internal static void SavePretrained(string folder, IEnumerable<TensorSource> tensors, long maxShardBytes)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(maxShardBytes);
        var shards = Split(Describe(tensors), maxShardBytes);
        Directory.CreateDirectory(folder);
        using var files = new PendingFiles();
        for (var i = 0; i < shards.Count; i++)
            Write(files.Add(Path.Combine(folder, ShardName(i, shards.Count))), shards[i], null);
        if (shards.Count > 1)
            WriteIndex(files.Add(Path.Combine(folder, IndexName)), shards);
        files.Commit();
        RemoveStale(folder, shards.Count);
    }

    private static string IndexName => SafetensorsFile.DefaultName + ".index.json";

    [GeneratedRegex(@"^model-\d{5}-of-\d{5}\.safetensors$")]
    private static partial Regex ShardPattern { get; }

    private static string ShardName(int index, int count) => count == 1 ? SafetensorsFile.DefaultName : $"model-{index + 1:D5}-of-{count:D5}.safetensors";

    private static List<Item> Describe(IEnumerable<TensorSource> tensors)
    {
        var names = new HashSet<string>();
        var items = new List<Item>();
        foreach (var tensor in tensors)
        {
            if (tensor.Name == SafetensorsFile.MetadataKey)
                throw new ArgumentException($"A tensor cannot be named '{tensor.Name}'.", nameof(tensors));
            if (!names.Add(tensor.Name))
                throw new ArgumentException($"Two tensors are named '{tensor.Name}'.", nameof(tensors));
            if (!DTypes.TryFormat(tensor.DType, out var dtype))
                throw new ArgumentException($"Tensor '{tensor.Name}' has the dtype {tensor.DType}, which is not supported (supported: {DTypes.All}).", nameof(tensors));
            items.Add(new Item(tensor, dtype.Name, dtype.Size, tensor.Shape.Aggregate(1L, (a, b) => a * b) * dtype.Size));
        }
        return items;
    }

    private static List<List<Item>> Split(List<Item> items, long maxShardBytes)
    {
        List<List<Item>> shards = [[]];
        var bytes = 0L;
        foreach (var item in items)
        {
            if (shards[^1].Count > 0 && bytes + item.Bytes > maxShardBytes)
            {
                shards.Add([]);
                bytes = 0;
            }
            shards[^1].Add(item);
            bytes += item.Bytes;
        }
        return shards;
    }

    private static void Write(Stream stream, List<Item> items, IReadOnlyDictionary<string, string>? metadata)
    {
        // As the reference implementation does: wide elements first, so that every tensor is aligned to its element size.
        List<Item> sorted = [.. items.OrderByDescending(item => item.Size).ThenBy(item => item.Name, StringComparer.Ordinal)];
        var header = Header(sorted, metadata ?? s_defaultMetadata);
        stream.Write(BitConverter.GetBytes((ulong)header.Length));
        stream.Write(header);
        foreach (var item in sorted)
            WriteData(stream, item);
    }

    private static ReadOnlySpan<byte> Header(List<Item> items, IReadOnlyDictionary<string, string> metadata)
    {
        var buffer = new ArrayBufferWriter<byte>();
        using (var json = new Utf8JsonWriter(buffer, new JsonWriterOptions { Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping }))
        {
            json.WriteStartObject();
            json.WriteStartObject(SafetensorsFile.MetadataKey);
            foreach (var (key, value) in metadata)
                json.WriteString(key, value);
            json.WriteEndObject();
            var offset = 0L;
            foreach (var item in items)
                WriteEntry(json, item, ref offset);
            json.WriteEndObject();
        }
        var padding = -buffer.WrittenCount & (Alignment - 1);
        buffer.GetSpan(Alignment)[..padding].Fill((byte)' ');
        buffer.Advance(padding);
        if (buffer.WrittenCount > SafetensorsFile.MaxHeaderBytes)
            throw new ArgumentException($"The header would have {buffer.WrittenCount} bytes; the format allows {SafetensorsFile.MaxHeaderBytes}.");
        return buffer.WrittenSpan;
    }

    private static void WriteEntry(Utf8JsonWriter json, Item item, ref long offset)
    {
        json.WriteStartObject(item.Name);
        json.WriteString("dtype", item.DType);
        json.WriteStartArray("shape");
        foreach (var size in item.Source.Shape)
            json.WriteNumberValue(size);
        json.WriteEndArray();
        json.WriteStartArray("data_offsets");
        json.WriteNumberValue(offset);
        json.WriteNumberValue(offset += item.Bytes);
        json.WriteEndArray();
        json.WriteEndObject();
    }

    private static unsafe void WriteData(Stream stream, Item item)
    {
        using var _ = NewDisposeScope();
        using var __ = no_grad();
        // Aliases, and what a source makes here, are disposed with the scope; the caller's tensor never is.
        var source = item.Source.Read().alias().cpu().contiguous();
        if (source.dtype != item.Source.DType || !source.shape.AsSpan().SequenceEqual(item.Source.Shape))
            throw new InvalidOperationException($"Tensor '{item.Name}' was to be {item.Source.DType} {Text.Of(item.Source.Shape)} and is {source.dtype} {Text.Of(source.shape)}: it changed while it was saved.");
        var data = item.Bytes == 0 ? null : (byte*)TensorBytes.Pointer(source);
        for (var done = 0L; done < item.Bytes; done += MaxWriteBytes)
            stream.Write(new ReadOnlySpan<byte>(data + done, (int)Math.Min(MaxWriteBytes, item.Bytes - done)));
        GC.KeepAlive(source);
    }

    private static void WriteIndex(Stream stream, List<List<Item>> shards)
    {
        var map = new SortedDictionary<string, string>(StringComparer.Ordinal);
        for (var i = 0; i < shards.Count; i++)
            foreach (var item in shards[i])
                map.Add(item.Name, ShardName(i, shards.Count));
        using var json = new Utf8JsonWriter(stream, new JsonWriterOptions { Indented = true, NewLine = "\n", Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping });
        json.WriteStartObject();
        json.WriteStartObject("metadata");
        json.WriteNumber("total_size", shards.Sum(shard => shard.Sum(item => item.Bytes)));
        json.WriteEndObject();
        json.WriteStartObject("weight_map");
        foreach (var (name, shard) in map)
            json.WriteString(name, shard);
        json.WriteEndObject();
        json.WriteEndObject();
    }

    /// <summary>Whether a file of this name is one of those that <see cref="SavePretrained(string, IReadOnlyList{ValueTuple{string, Tensor}}, long)"/> writes.</summary>
    internal static bool IsWeightFile(string name) => name == SafetensorsFile.DefaultName || name == IndexName || ShardPattern.IsMatch(name);

    // An older model.safetensors or index would be read instead of, or mixed with, what was just written.
    private static void RemoveStale(string folder, int count)
    {
        var current = Enumerable.Range(0, count).Select(i => ShardName(i, count)).Append(count > 1 ? IndexName : "").ToHashSet();
        foreach (var file in Directory.GetFiles(folder, "model*"))
        {
            var name = Path.GetFileName(file);
            if (!current.Contains(name) && IsWeightFile(name))
                File.Delete(file);
        }
    }

    private sealed record Item(TensorSource Source, string DType, int Size, long Bytes)
    {
        public string Name => Source.Name;
    }
}

/// <summary>A tensor to write: known by name, shape and type at once, and read when its turn comes.</summary>
internal sealed record TensorSource(string Name, long[] Shape, ScalarType DType, Func<Tensor> Read)
{
    public static TensorSource Of((string Name, Tensor Tensor) t) => new(t.Name, t.Tensor.shape, t.Tensor.dtype, () => t.Tensor);
}

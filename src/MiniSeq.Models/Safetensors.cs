using System.IO.MemoryMappedFiles;
using System.Runtime.InteropServices;
using System.Text.Json;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>Reads tensors from safetensors files: one file, or a sharded Hugging Face checkpoint.</summary>
/// <remarks>
/// Format: https://huggingface.co/docs/safetensors. Files are memory-mapped and checked whole when opened: every header, shape and byte
/// range is validated before the first tensor is read, so a reader that opened can be read. Reading from several threads is safe.
/// Supported dtypes: F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL.
/// </remarks>
public sealed class SafetensorsReader : IDisposable
{
    private const string IndexSuffix = ".index.json";
    private readonly Dictionary<string, (SafetensorsFile File, TensorEntry Entry)> _tensors = [];
    private readonly Dictionary<string, string> _metadata = [];
    private readonly List<SafetensorsFile> _files = [];
    private readonly List<string> _names = [];
    private string? _index;
    private bool _disposed;

    private SafetensorsReader()
    {
    }

    /// <summary>The names of all tensors, in the order of their bytes, shard by shard.</summary>
    public IReadOnlyCollection<string> Names => _names;

    /// <summary>The <c>__metadata__</c> entries. Of a sharded checkpoint: those of all shards, the first shard's value winning.</summary>
    public IReadOnlyDictionary<string, string> Metadata => _metadata;

    /// <summary>The files that are read: the shards and their index, or the one file.</summary>
    internal IEnumerable<string> Paths => [.. _index is null ? Array.Empty<string>() : [_index], .. _files.Select(file => file.Path)];

    /// <summary>Opens a checkpoint.</summary>
    /// <param name="path">A <c>.safetensors</c> file, a <c>model.safetensors.index.json</c>, or a folder that holds <c>model.safetensors</c> or
    /// that index.</param>
    /// <exception cref="FileNotFoundException">The path, or a shard the index names, is not there.</exception>
    /// <exception cref="InvalidDataException">A file is damaged or is not safetensors; the message names file, tensor and fault.</exception>
    public static SafetensorsReader Open(string path)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        var reader = new SafetensorsReader();
        try
        {
            var file = Locate(path);
            if (file.EndsWith(".json", StringComparison.OrdinalIgnoreCase))
                reader.AddShards(reader._index = file);
            else
                reader.AddFile(file);
            return reader;
        }
        catch
        {
            reader.Dispose();
            throw;
        }
    }

    /// <summary>Whether a tensor of this name is there.</summary>
    public bool Contains(string name) => _tensors.ContainsKey(name);

    /// <summary>The shape of a tensor; empty for a scalar.</summary>
    /// <exception cref="KeyNotFoundException">There is no tensor of this name.</exception>
    public long[] Shape(string name) => [.. Find(name).Entry.Shape];

    /// <summary>The dtype a tensor is stored in.</summary>
    /// <exception cref="KeyNotFoundException">There is no tensor of this name.</exception>
    public ScalarType DType(string name) => Find(name).Entry.DType;

    /// <summary>Reads a tensor into fresh memory.</summary>
    /// <returns>A CPU tensor of the stored shape and dtype; the caller disposes it.</returns>
    /// <exception cref="KeyNotFoundException">There is no tensor of this name.</exception>
    public Tensor Read(string name)
    {
        var (file, entry) = Find(name);
        var tensor = empty(entry.Shape, entry.DType, CPU);
        file.CopyTo(entry, tensor);
        return tensor;
    }

    /// <summary>Reads a tensor into an existing one, a parameter for example, converting to its dtype and device.</summary>
    /// <param name="name">The name in the file.</param>
    /// <param name="destination">A tensor of the same shape. Its old values are overwritten, outside autograd.</param>
    /// <remarks>Needs one tensor of extra memory where dtype, device or layout differ, and none where they agree.</remarks>
    /// <exception cref="KeyNotFoundException">There is no tensor of this name.</exception>
    /// <exception cref="InvalidDataException">The shapes differ.</exception>
    public void ReadInto(string name, Tensor destination)
    {
        ArgumentNullException.ThrowIfNull(destination);
        var (file, entry) = Find(name);
        if (!destination.shape.AsSpan().SequenceEqual(entry.Shape))
            throw file.Fault(name, $"has shape {Text.Of(entry.Shape)}, the model wants {Text.Of(destination.shape)}");

        if (destination.dtype == entry.DType && destination.device_type == DeviceType.CPU && destination.is_contiguous())
        {
            file.CopyTo(entry, destination);
            return;
        }
        using var _ = no_grad();
        using var stored = Read(name);
        destination.copy_(stored);
    }

    /// <summary>Unmaps the files. Tensors that were read stay valid.</summary>
    public void Dispose()
    {
        if (!_disposed)
            _files.ForEach(file => file.Dispose());
        _disposed = true;
    }

    private static string Locate(string path)
    {
        if (File.Exists(path))
            return path;
        if (!Directory.Exists(path))
            throw new FileNotFoundException($"{path}: no such file or folder.", path);
        var single = Path.Combine(path, SafetensorsFile.DefaultName);
        var index = single + IndexSuffix;
        return File.Exists(single) ? single
            : File.Exists(index) ? index
            : throw new FileNotFoundException($"{path}: the folder holds neither {SafetensorsFile.DefaultName} nor {Path.GetFileName(index)}.", single);
    }

    private (SafetensorsFile File, TensorEntry Entry) Find(string name)
    {
        ObjectDisposedException.ThrowIf(_disposed, this);
        return _tensors.TryGetValue(name, out var found)
            ? found
            : throw new KeyNotFoundException($"{_files[0].Path}: there is no tensor '{name}'.");
    }

    private SafetensorsFile AddFile(string path)
    {
        var file = new SafetensorsFile(path);
        _files.Add(file);
        foreach (var entry in file.Entries)
        {
            if (!_tensors.TryAdd(entry.Name, (file, entry)))
                throw file.Fault(entry.Name, $"is also in {_tensors[entry.Name].File.Path}");
            _names.Add(entry.Name);
        }
        foreach (var (key, value) in file.Metadata)
            _metadata.TryAdd(key, value);
        return file;
    }

    private void AddShards(string index)
    {
        var folder = Path.GetDirectoryName(Path.GetFullPath(index))!;
        var map = ReadIndex(index);
        var shards = new Dictionary<string, SafetensorsFile>();
        foreach (var shard in map.Values.Distinct().Order(StringComparer.Ordinal))
        {
            var path = Path.Combine(folder, shard);
            if (!File.Exists(path))
                throw new FileNotFoundException($"{index}: names the shard '{shard}', which is not there.", path);
            shards[shard] = AddFile(path);
        }
        foreach (var (name, shard) in map)
            if (!_tensors.TryGetValue(name, out var found) || found.File != shards[shard])
                throw new InvalidDataException($"{index}: tensor {Text.Of(name)} is said to be in '{shard}' and is not.");
    }

    private static Dictionary<string, string> ReadIndex(string index)
    {
        var length = new FileInfo(index).Length;
        if (length > SafetensorsFile.MaxHeaderBytes)
            throw new InvalidDataException($"{index}: the index has {length} bytes; at most {SafetensorsFile.MaxHeaderBytes} are allowed.");
        return Text.ParseObject(File.ReadAllBytes(index), index, root =>
        {
            if (!root.TryGetProperty("weight_map", out var weights) || weights.ValueKind != JsonValueKind.Object)
                throw new InvalidDataException($"{index}: has no object 'weight_map'.");
            var map = new Dictionary<string, string>();
            foreach (var entry in weights.EnumerateObject())
                map.Add(entry.Name, ShardName(index, entry));
            return map;
        });
    }

    /// <summary>A shard lies beside its index: anything that could lead elsewhere is refused.</summary>
    private static string ShardName(string index, JsonProperty entry)
    {
        var shard = entry.Value.ValueKind == JsonValueKind.String ? entry.Value.GetString()! : "";
        if (shard is "" or "." or ".." || shard.AsSpan().IndexOfAny("/\\:\0") >= 0)
            throw new InvalidDataException($"{index}: tensor {Text.Of(entry.Name)}: {Text.Of(entry.Value.GetRawText())} is no file name of a shard.");
        return shard;
    }
}

/// <summary>Where a tensor lies: <paramref name="Begin"/> counts bytes from the end of the header.</summary>
internal sealed record TensorEntry(string Name, ScalarType DType, long[] Shape, long Begin, long End);

/// <summary>One mapped .safetensors file, its header parsed and checked.</summary>
internal sealed unsafe class SafetensorsFile : IDisposable
{
    public const string DefaultName = "model.safetensors";
    public const string MetadataKey = "__metadata__";
    public const long MaxHeaderBytes = 100_000_000;
    private const int MaxDimensions = 64; // libtorch's own limit
    private const int LengthBytes = sizeof(ulong);

    private readonly MemoryMappedFile _map;
    private readonly MemoryMappedViewAccessor _view;
    private readonly byte* _data;
    private readonly long _dataLength;

    public SafetensorsFile(string path)
    {
        Path = path;
        using var stream = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read | FileShare.Delete);
        var header = ReadHeader(stream);
        _dataLength = stream.Length - LengthBytes - header.Length;
        (Entries, Metadata) = Text.ParseObject(header, path, Parse);
        CheckLayout();
        _map = MemoryMappedFile.CreateFromFile(stream, null, 0, MemoryMappedFileAccess.Read, HandleInheritability.None, leaveOpen: true);
        _view = _map.CreateViewAccessor(0, 0, MemoryMappedFileAccess.Read);
        byte* start = null;
        _view.SafeMemoryMappedViewHandle.AcquirePointer(ref start);
        _data = start + LengthBytes + header.Length;
    }

    public string Path { get; }

    public List<TensorEntry> Entries { get; }

    public Dictionary<string, string> Metadata { get; }

    /// <summary>Copies the bytes of an entry to a contiguous CPU tensor of its shape and dtype.</summary>
    public void CopyTo(TensorEntry entry, Tensor tensor)
    {
        var bytes = entry.End - entry.Begin;
        if (bytes == 0)
            return;
        var target = (byte*)TensorBytes.Pointer(tensor);
        Buffer.MemoryCopy(_data + entry.Begin, target, bytes, bytes);
        Forget(_data + entry.Begin, bytes);
        // Any other value than 0 and 1 in a bool is undefined behaviour in libtorch.
        if (entry.DType == ScalarType.Bool)
            for (long i = 0; i < bytes; i++)
                target[i] = target[i] == 0 ? (byte)0 : (byte)1;
        GC.KeepAlive(tensor);
        GC.KeepAlive(this);
    }

    // The pages that were read count as the process's own until they are given back: the whole model a second time. Advice, so no error matters.
    private static void Forget(byte* start, long bytes)
    {
        if (!OperatingSystem.IsLinux()) return;
        long page = Environment.SystemPageSize;
        nint first = (nint)(((long)start + page - 1) / page * page);
        long whole = ((long)start + bytes - first) / page * page;
        if (whole > 0) madvise(first, (nint)whole, DontNeed);
    }

    private const int DontNeed = 4;

    [DllImport("libc")]
    private static extern int madvise(nint address, nint length, int advice);

    public InvalidDataException Fault(string tensor, string fault) => new($"{Path}: tensor {Text.Of(tensor)} {fault}.");

    public void Dispose()
    {
        _view.SafeMemoryMappedViewHandle.ReleasePointer();
        _view.Dispose();
        _map.Dispose();
    }

    private byte[] ReadHeader(FileStream stream)
    {
        if (stream.Length < LengthBytes)
            throw Fault($"has {stream.Length} bytes and no room for the header's length");
        Span<byte> length = stackalloc byte[LengthBytes];
        stream.ReadExactly(length);
        if (length.SequenceEqual("version "u8))
            throw Fault("is a pointer of Git LFS and not the file itself: fetch it with 'git lfs pull'");
        var bytes = BitConverter.ToUInt64(length);
        if (bytes > MaxHeaderBytes)
            throw Fault($"the header would have {bytes} bytes; at most {MaxHeaderBytes} are allowed");
        if ((long)bytes > stream.Length - LengthBytes)
            throw Fault($"the header would have {bytes} bytes, the file has {stream.Length}");
        var header = new byte[bytes];
        stream.ReadExactly(header);
        return header;
    }

    private (List<TensorEntry>, Dictionary<string, string>) Parse(JsonElement root)
    {
        var entries = new List<TensorEntry>();
        var metadata = new Dictionary<string, string>();
        foreach (var property in root.EnumerateObject())
            if (property.Name == MetadataKey)
                ParseMetadata(property.Value, metadata);
            else
                entries.Add(ParseEntry(property.Name, property.Value));
        return ([.. entries.OrderBy(entry => entry.Begin).ThenBy(entry => entry.End)], metadata);
    }

    private void ParseMetadata(JsonElement value, Dictionary<string, string> metadata)
    {
        if (value.ValueKind != JsonValueKind.Object)
            throw Fault($"{MetadataKey} is not an object of strings");
        foreach (var entry in value.EnumerateObject())
            metadata.Add(entry.Name, entry.Value.ValueKind == JsonValueKind.String
                ? entry.Value.GetString()!
                : throw Fault($"{MetadataKey} entry {Text.Of(entry.Name)} is not a string"));
    }

    private TensorEntry ParseEntry(string name, JsonElement value)
    {
        if (value.ValueKind != JsonValueKind.Object)
            throw Fault(name, "is not described by an object");
        var (dtype, size) = ParseDType(name, value);
        var shape = ParseNumbers(name, value, "shape");
        var offsets = ParseNumbers(name, value, "data_offsets");
        if (offsets.Length != 2 || offsets[0] > offsets[1])
            throw Fault(name, $"has data_offsets {Text.Of(offsets)}, which are not [begin, end]");
        if (offsets[1] > _dataLength)
            throw Fault(name, $"ends at byte {offsets[1]} of the data, the file holds {_dataLength}");
        var needed = ByteCount(name, shape, size);
        if (needed != offsets[1] - offsets[0])
            throw Fault(name, $"of shape {Text.Of(shape)} needs {needed} bytes, its data_offsets {Text.Of(offsets)} hold {offsets[1] - offsets[0]}");
        return new TensorEntry(name, dtype, shape, offsets[0], offsets[1]);
    }

    private (ScalarType, int) ParseDType(string name, JsonElement value)
    {
        if (!value.TryGetProperty("dtype", out var dtype) || dtype.ValueKind != JsonValueKind.String)
            throw Fault(name, "has no string 'dtype'");
        return DTypes.TryParse(dtype.GetString()!, out var found)
            ? found
            : throw Fault(name, $"has the dtype {Text.Of(dtype.GetString()!)}, which is not supported (supported: {DTypes.All})");
    }

    private long[] ParseNumbers(string name, JsonElement value, string key)
    {
        if (!value.TryGetProperty(key, out var array) || array.ValueKind != JsonValueKind.Array)
            throw Fault(name, $"has no array '{key}'");
        if (array.GetArrayLength() > MaxDimensions)
            throw Fault(name, $"has {array.GetArrayLength()} numbers in '{key}'; at most {MaxDimensions} are allowed");
        return [.. array.EnumerateArray().Select(item =>
            item.ValueKind == JsonValueKind.Number && item.TryGetInt64(out var number) && number >= 0
                ? number
                : throw Fault(name, $"has {Text.Of(item.GetRawText())} in '{key}', which is no count"))];
    }

    private long ByteCount(string name, long[] shape, int size)
    {
        try
        {
            // Zeros are left out first: libtorch multiplies the other sizes of an empty tensor too.
            var product = shape.Where(n => n != 0).Aggregate((long)size, (bytes, n) => checked(bytes * n));
            return shape.Contains(0) ? 0 : product;
        }
        catch (OverflowException)
        {
            throw Fault(name, $"of shape {Text.Of(shape)} has more bytes than can be counted");
        }
    }

    /// <summary>The entries, in order of their offsets, have to cover the data exactly.</summary>
    private void CheckLayout()
    {
        var end = 0L;
        foreach (var entry in Entries)
        {
            if (entry.Begin != end)
                throw Fault(entry.Name, $"begins at byte {entry.Begin} of the data where {end} is due: {(entry.Begin < end ? "it overlaps its neighbour" : "there is a gap")}");
            end = entry.End;
        }
        if (end != _dataLength)
            throw Fault($"the tensors end at byte {end} of the data, the file holds {_dataLength}");
    }

    private InvalidDataException Fault(string fault) => new($"{Path}: {fault}.");
}

/// <summary>The dtypes of the format that are supported, with their size in bytes.</summary>
internal static class DTypes
{
    private static readonly (string Name, ScalarType Type, int Size)[] s_table =
    [
        ("F64", ScalarType.Float64, 8), ("F32", ScalarType.Float32, 4), ("F16", ScalarType.Float16, 2), ("BF16", ScalarType.BFloat16, 2),
        ("I64", ScalarType.Int64, 8), ("I32", ScalarType.Int32, 4), ("I16", ScalarType.Int16, 2), ("I8", ScalarType.Int8, 1),
        ("U8", ScalarType.Byte, 1), ("BOOL", ScalarType.Bool, 1),
    ];

    public static string All { get; } = string.Join(", ", s_table.Select(row => row.Name));

    public static bool TryParse(string name, out (ScalarType Type, int Size) found)
    {
        var row = Array.Find(s_table, row => row.Name == name);
        found = (row.Type, row.Size);
        return row.Name is not null;
    }

    public static bool TryFormat(ScalarType type, out (string Name, int Size) found)
    {
        var row = Array.Find(s_table, row => row.Type == type);
        found = (row.Name, row.Size);
        return row.Name is not null;
    }
}

/// <summary>The memory of a CPU tensor, by libtorch's C interface: TorchSharp's own <c>Tensor.bytes</c> ends at 2 GB.</summary>
internal static unsafe partial class TensorBytes
{
    /// <summary>The address of the first element; keep the tensor alive while it is used.</summary>
    public static nint Pointer(Tensor tensor)
    {
        nint pointer;
        return GetDataPointer(tensor.Handle, &pointer) == 0
            ? pointer
            : throw new InvalidOperationException("libtorch gave no address for a tensor's memory.");
    }

    [LibraryImport("torch_cpu", EntryPoint = "aoti_torch_get_data_ptr")]
    private static partial int GetDataPointer(nint tensor, nint* pointer);
}

/// <summary>Untrusted text in, error messages out.</summary>
internal static class Text
{
    private const int MaxShown = 200;

    /// <summary>Quotes a name from a file, shortened: it may be as long as the file.</summary>
    public static string Of(string name) => name.Length <= MaxShown ? $"'{name}'" : $"'{name.AsSpan(0, MaxShown)}...'";

    public static string Of(long[] numbers) => $"[{string.Join(", ", numbers)}]";

    /// <summary>Parses a JSON object and reads it; every way in which JSON can be wrong ends as one exception that names the file.</summary>
    public static T ParseObject<T>(ReadOnlyMemory<byte> json, string file, Func<JsonElement, T> read)
    {
        try
        {
            using var document = JsonDocument.Parse(json, new JsonDocumentOptions { AllowDuplicateProperties = false });
            return document.RootElement.ValueKind == JsonValueKind.Object
                ? read(document.RootElement)
                : throw new InvalidDataException($"{file}: the JSON is not an object.");
        }
        catch (Exception fault) when (fault is JsonException or InvalidOperationException or FormatException or OverflowException or KeyNotFoundException)
        {
            // InvalidOperationException: a string that is no valid text, or a value of another kind than was asked for.
            throw new InvalidDataException($"{file}: malformed JSON: {fault.Message}", fault);
        }
    }
}

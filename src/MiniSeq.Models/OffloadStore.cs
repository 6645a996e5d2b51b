using System.Globalization;
using Microsoft.Win32.SafeHandles;
using MiniSeq.Layers;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>Where the inputs of layers wait for backward, outside the memory that they would fill. One for a pass; the last in is the first out.</summary>
internal abstract class OffloadStore : IDisposable
{
    /// <summary>The store of a pass; null where nothing is offloaded.</summary>
    /// <param name="folder"><see cref="ComputeOptions.OffloadFolder"/>.</param>
    /// <param name="bytes">Bytes of all tensors that will be in it at once.</param>
    /// <param name="device">Where the tensors come from.</param>
    /// <exception cref="IOException">No file of that size can be made in the folder.</exception>
    public static OffloadStore? Create(string? folder, long bytes, Device device) =>
        folder is null ? null : device.type == DeviceType.CPU ? new OffloadFile(folder, bytes) : new OffloadHost(device);

    /// <summary>Takes a copy; the caller still owns the tensor.</summary>
    public abstract void Push(Tensor tensor);

    /// <summary>The tensor of the last push, equal to the bit.</summary>
    public abstract Tensor Pop();

    /// <inheritdoc/>
    public abstract void Dispose();
}

/// <summary>A temporary file. On Unix it has no name from the first moment on, and on Windows the system deletes it: nothing is left of it, even after a crash.</summary>
/// <remarks>
/// Plain writes and reads, and not a mapped file: on a full disk those end in an exception, which says what to do, and a write to
/// mapped memory in a signal (SIGBUS), which ends the process.
/// </remarks>
internal sealed unsafe class OffloadFile : OffloadStore
{
    private const int PieceBytes = 8 << 20;

    private readonly Stack<(long Offset, long Bytes, long[] Shape, ScalarType DType)> _tensors = [];
    private readonly string _folder;
    private readonly long _bytes;
    private readonly SafeFileHandle _file;

    /// <summary>A file with room for all that will be in it.</summary>
    public OffloadFile(string folder, long bytes)
    {
        (_folder, _bytes) = (folder, bytes);
        string path = Path.Combine(folder, $"miniseq-{Guid.NewGuid():N}.tmp");
        try
        {
            _file = File.OpenHandle(path, FileMode.CreateNew, FileAccess.ReadWrite, FileShare.Delete, FileOptions.DeleteOnClose, bytes);
            if (!OperatingSystem.IsWindows()) File.Delete(path);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or NotSupportedException or ArgumentException)
        {
            throw Failure(e);
        }
    }

    /// <summary>The same over a file that is open, for tests.</summary>
    internal OffloadFile(string folder, long bytes, SafeFileHandle file) => (_folder, _bytes, _file) = (folder, bytes, file);

    /// <summary>Throws where no file can be made in a folder.</summary>
    /// <exception cref="IOException">Names the folder and the reason.</exception>
    public static void CheckFolder(string folder) => new OffloadFile(folder, 0).Dispose();

    public override void Push(Tensor tensor)
    {
        using var ordered = tensor.contiguous();
        long offset = _tensors.TryPeek(out var top) ? top.Offset + top.Bytes : 0, bytes = ordered.numel() * ordered.element_size();
        var memory = (byte*)Aten.DataPointer(ordered);
        try
        {
            for (long at = 0; at < bytes; at += PieceBytes) RandomAccess.Write(_file, new ReadOnlySpan<byte>(memory + at, (int)Math.Min(PieceBytes, bytes - at)), offset + at);
        }
        catch (IOException e)
        {
            throw Failure(e);
        }
        GC.KeepAlive(ordered);
        _tensors.Push((offset, bytes, ordered.shape, ordered.dtype));
    }

    public override Tensor Pop()
    {
        var (offset, bytes, shape, dtype) = _tensors.Pop();
        var tensor = empty(shape, dtype);
        var memory = (byte*)Aten.DataPointer(tensor);
        for (long at = 0; at < bytes;)
        {
            int read = RandomAccess.Read(_file, new Span<byte>(memory + at, (int)Math.Min(PieceBytes, bytes - at)), offset + at);
            if (read == 0) throw new EndOfStreamException($"The temporary file in '{_folder}' (ComputeOptions.OffloadFolder) ends after {offset + at} bytes; {offset + bytes} were written.");
            at += read;
        }
        return tensor;
    }

    public override void Dispose() => _file.Dispose();

    private IOException Failure(Exception e)
    {
        string size = _bytes > 0 ? string.Create(CultureInfo.InvariantCulture, $" of {_bytes:N0} bytes, the inputs of all layers of this step,") : "";
        return new IOException($"A temporary file{size} cannot be written in '{_folder}' (ComputeOptions.OffloadFolder): {e.Message.TrimEnd('.')}.{Free(_folder)} Name a folder that exists, may be written to and has the room, or train on shorter documents.", e);
    }

    private static string Free(string folder)
    {
        try
        {
            return string.Create(CultureInfo.InvariantCulture, $" {new DriveInfo(Path.GetFullPath(folder)).AvailableFreeSpace:N0} bytes are free there.");
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException)
        {
            return ""; // no such folder
        }
    }
}

/// <summary>Host memory for the tensors of a GPU, pinned where it is CUDA's. Written and not run: no GPU was at hand.</summary>
internal sealed class OffloadHost(Device device) : OffloadStore
{
    private readonly Stack<Tensor> _tensors = [];

    public override void Push(Tensor tensor)
    {
        using var scope = NewDisposeScope();
        var host = empty(tensor.shape, tensor.dtype);
        if (device.type == DeviceType.CUDA) host = host.pin_memory();
        _tensors.Push(host.copy_(tensor).DetachFromDisposeScope());
    }

    public override Tensor Pop()
    {
        using var host = _tensors.Pop();
        return host.to(device);
    }

    public override void Dispose()
    {
        foreach (var tensor in _tensors) tensor.Dispose();
    }
}

using Microsoft.ML;
using TorchSharp;

namespace MiniSeq.MLNet;

/// <summary>Where an <see cref="MLContext"/> wants models to run.</summary>
internal static class ComputeDevice
{
    /// <summary>The GPU of <see cref="MLContext.GpuDeviceId"/>, or the CPU where none is asked for or <see cref="MLContext.FallbackToCpu"/> allows it.</summary>
    /// <exception cref="InvalidOperationException">There is no such GPU, and no fallback.</exception>
    public static torch.Device Of(MLContext context)
    {
        if (context.GpuDeviceId is not { } id) return torch.CPU;
        int count = torch.cuda.is_available() ? torch.cuda.device_count() : 0;
        if (id >= 0 && id < count) return new torch.Device(DeviceType.CUDA, id);
        if (context.FallbackToCpu) return torch.CPU;
        throw new InvalidOperationException(count == 0
            ? $"MLContext.GpuDeviceId is {id} and no CUDA device is available: reference a CUDA build of TorchSharp and check the driver, or set MLContext.FallbackToCpu."
            : $"MLContext.GpuDeviceId is {id} and there are CUDA devices 0 to {count - 1}: choose one of them, or set MLContext.FallbackToCpu.");
    }
}

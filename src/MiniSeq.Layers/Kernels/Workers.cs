using static TorchSharp.torch;

namespace MiniSeq.Layers.Kernels;

/// <summary>Runs the tasks of a kernel on as many threads as libtorch uses.</summary>
internal static class Workers
{
    /// <summary>Threads, at least one.</summary>
    public static int Count => Math.Max(1, get_num_threads());

    /// <summary>task(worker, index) for each index below <paramref name="tasks"/>, in order of the index as workers get free. Tasks use no tensors, only their memory; a worker is one thread.</summary>
    public static void Run(int workers, int tasks, Action<int, int> task)
    {
        int next = -1;
        Parallel.For(0, Math.Min(workers, tasks), new ParallelOptions { MaxDegreeOfParallelism = workers }, worker =>
        {
            for (int i = Interlocked.Increment(ref next); i < tasks; i = Interlocked.Increment(ref next)) task(worker, i);
            MatrixKernel.Release();
        });
    }
}

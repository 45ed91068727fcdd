//go:build linux

package child

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/platforms"
	cachemetadata "github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/control"
	"github.com/moby/buildkit/executor"
	"github.com/moby/buildkit/executor/oci"
	"github.com/moby/buildkit/executor/resources"
	"github.com/moby/buildkit/executor/runcexecutor"
	"github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage"
	"github.com/moby/buildkit/frontend"
	dockerfile "github.com/moby/buildkit/frontend/dockerfile/builder"
	"github.com/moby/buildkit/frontend/gateway/forwarder"
	"github.com/moby/buildkit/session"
	containerdsnapshot "github.com/moby/buildkit/snapshot/containerd"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/bboltcachestorage"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/disk"
	"github.com/moby/buildkit/util/leaseutil"
	"github.com/moby/buildkit/util/network"
	"github.com/moby/buildkit/util/winlayers"
	"github.com/moby/buildkit/worker"
	"github.com/moby/buildkit/worker/base"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.etcd.io/bbolt"
)

const namespace = "buildkit"

// newController puts a BuildKit together in dir. Its Close closes everything in it.
func newController(ctx context.Context, dir, contentDir, runc string, s *store, vms *vms) (*control.Controller, error) {
	w, err := newWorker(ctx, dir, contentDir, runc, s, vms)
	if err != nil {
		return nil, err
	}
	wc := &worker.Controller{}
	if err := wc.Add(w); err != nil {
		return nil, err
	}
	sessions, err := session.NewManager()
	if err != nil {
		return nil, err
	}
	cache, err := bboltcachestorage.NewStore(filepath.Join(dir, "cache.db"))
	if err != nil {
		return nil, err
	}
	history, err := openDB(filepath.Join(dir, "history.db"))
	if err != nil {
		return nil, err
	}
	return control.NewController(control.Opt{
		SessionManager:   sessions,
		WorkerController: wc,
		Frontends: map[string]frontend.Frontend{
			"dockerfile.v0": forwarder.NewGatewayForwarder(wc.Infos(), dockerfile.Build),
		},
		CacheManager:   solver.NewCacheManager(ctx, "local", cache, worker.NewCacheResultStorage(wc)),
		Entitlements:   []string{"network.host"},
		HistoryDB:      history,
		CacheStore:     cache,
		LeaseManager:   w.LeaseManager(),
		ContentStore:   w.ContentStore(),
		GarbageCollect: w.GarbageCollect,
		GracefulStop:   ctx.Done(),
	})
}

// imageWorker is BuildKit's worker with our exporter added.
type imageWorker struct {
	*base.Worker
	exporter *imageExporter
	vms      *vms
}

func (w *imageWorker) Exporter(name string, sm *session.Manager) (exporter.Exporter, error) {
	if name == ExporterName {
		return w.exporter, nil
	}
	return w.Worker.Exporter(name, sm)
}

func newWorker(ctx context.Context, dir, contentDir, runc string, s *store, vms *vms) (*imageWorker, error) {
	hostNetwork := network.NewHostProvider()
	networks := map[pb.NetMode]network.Provider{
		pb.NetMode_UNSET: hostNetwork,
		pb.NetMode_HOST:  hostNetwork,
		pb.NetMode_NONE:  network.NewNoneProvider(),
	}
	executor, err := newExecutor(dir, runc, networks)
	if err != nil {
		return nil, err
	}
	snapshotterName, snapshotter, err := newSnapshotter(dir)
	if err != nil {
		return nil, err
	}
	blobs := filepath.Join(dir, "content")
	localContent, err := local.NewStore(blobs)
	if err != nil {
		return nil, err
	}
	db, err := openDB(filepath.Join(dir, "containerd.db"))
	if err != nil {
		return nil, err
	}
	mdb := metadata.NewDB(db, localContent, map[string]snapshots.Snapshotter{snapshotterName: snapshotter})
	if err := mdb.Init(ctx); err != nil {
		return nil, err
	}
	md, err := cachemetadata.NewStore(filepath.Join(dir, "metadata.db"))
	if err != nil {
		return nil, err
	}
	id, err := base.ID(dir)
	if err != nil {
		return nil, err
	}
	gc, err := gcPolicy(dir)
	if err != nil {
		return nil, err
	}
	contentStore := containerdsnapshot.NewContentStore(mdb.ContentStore(), namespace)
	snaps := containerdsnapshot.NewSnapshotter(snapshotterName, mdb.Snapshotter(snapshotterName), namespace, nil)
	leases := leaseutil.WithNamespace(metadata.NewLeaseManager(mdb), namespace)
	applier := winlayers.NewFileSystemApplierWithWindows(contentStore, apply.NewFileSystemApplier(contentStore))
	differ := winlayers.NewWalkingDiffWithWindows(contentStore, walking.NewWalkingDiff(contentStore))

	w, err := base.NewWorker(ctx, base.WorkerOpt{
		ID:               id,
		Root:             dir,
		Platforms:        []ocispec.Platform{platforms.Normalize(platforms.DefaultSpec())},
		GCPolicy:         gc,
		NetworkProviders: networks,
		Executor:         executor,
		Snapshotter:      snaps,
		ContentStore:     contentStore,
		Applier:          applier,
		Differ:           differ,
		ImageStore:       s,
		RegistryHosts:    s.hosts,
		LeaseManager:     leases,
		GarbageCollect:   mdb.GarbageCollect,
		MetadataStore:    md,
		MountPoolRoot:    filepath.Join(dir, "cachemounts"),
	})
	if err != nil {
		return nil, err
	}
	writer, err := containerimage.NewImageWriter(containerimage.WriterOpt{
		Snapshotter:  snaps,
		ContentStore: contentStore,
		Applier:      applier,
		Differ:       differ,
	})
	if err != nil {
		return nil, err
	}
	return &imageWorker{w, &imageExporter{writer: writer, leases: leases, from: blobs, to: contentDir}, vms}, nil
}

// newExecutor runs steps on this host. Without runc there are only the VMs.
func newExecutor(dir, runc string, networks map[pb.NetMode]network.Provider) (executor.Executor, error) {
	if runc == "" {
		return noExecutor{}, nil
	}
	return runcexecutor.New(runcexecutor.Opt{
		Root:                executorDir(dir),
		CommandCandidates:   []string{runc},
		ProcessMode:         oci.ProcessSandbox,
		DefaultCgroupParent: "atoll-build",
		// The zero monitor records nothing. One made by NewMonitor would move the processes of our own cgroup about.
		ResourceMonitor: &resources.Monitor{},
	}, networks)
}

// newSnapshotter prefers overlay; the native one copies whole trees but works where overlay cannot be stacked.
func newSnapshotter(dir string) (string, snapshots.Snapshotter, error) {
	root := filepath.Join(dir, "snapshots-overlayfs")
	if err := os.MkdirAll(root, 0o700); err != nil {
		return "", nil, err
	}
	if overlayutils.Supported(root) == nil {
		s, err := overlay.NewSnapshotter(root, overlay.AsynchronousRemove)
		return "overlayfs", s, err
	}
	s, err := native.NewSnapshotter(filepath.Join(dir, "snapshots-native"))
	return "native", s, err
}

func openDB(path string) (*bbolt.DB, error) {
	return bbolt.Open(path, 0o600, &bbolt.Options{FreelistType: bbolt.FreelistMapType})
}

// gcPolicy keeps the cache under 10 GB or a fifth of the disk, whichever is less; what is easily had again goes first.
func gcPolicy(dir string) ([]client.PruneInfo, error) {
	stat, err := disk.GetDiskStat(dir)
	if err != nil {
		return nil, err
	}
	most := min(10e9, stat.Total/5)
	return []client.PruneInfo{
		{
			Filter:       []string{"type==source.local", "type==exec.cachemount", "type==source.git.checkout"},
			KeepDuration: 48 * time.Hour,
			MaxUsedSpace: most / 10,
		},
		{MaxUsedSpace: most},
		{All: true, MaxUsedSpace: most},
	}, nil
}

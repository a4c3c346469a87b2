//! Private memory on the way between frames and files, so that no device ever reads or writes a frame.

use crate::units::CLUSTER_BYTES;

/// A cluster's worth of memory, aligned for direct transfers.
#[derive(Debug, Clone)]
#[repr(C, align(4096))]
pub struct Page(pub [u8; 4096]);

const _: () = assert!(size_of::<Page>() as u64 == CLUSTER_BYTES);

impl Page {
    /// A page of zeroes.
    pub const fn zeroed() -> Self {
        Self([0; 4096])
    }
}

/// Pages for the fills of one context. They are kept once made.
#[derive(Debug, Default)]
pub struct Pages {
    /// All pages. Boxed one by one: a page under way must not move.
    pages: Vec<Box<Page>>,
    /// Those that are free.
    free: Vec<usize>,
}

/// The most pages of a context.
const PAGES_MAX: usize = 256;

impl Pages {
    /// A free page, or `None` if all are under way.
    pub fn take(&mut self) -> Option<usize> {
        if let Some(page) = self.free.pop() {
            return Some(page);
        }
        if self.pages.len() >= PAGES_MAX {
            return None;
        }
        self.pages.push(Box::new(Page::zeroed()));
        Some(self.pages.len() - 1)
    }

    /// Gives a page back.
    pub fn give(&mut self, page: usize) {
        self.free.push(page);
    }

    /// A page.
    pub fn get_mut(&mut self, page: usize) -> Option<&mut Page> {
        self.pages.get_mut(page).map(|page| &mut **page)
    }

    /// Its address, for a transfer.
    pub fn address(&mut self, page: usize) -> Option<*mut u8> {
        self.pages.get_mut(page).map(|page| page.0.as_mut_ptr())
    }
}

/// The pages of a staging buffer for write-back.
const STAGING_PAGES: u64 = 256;

/// A buffer in which dirty clusters are gathered on their way to a file.
#[derive(Debug)]
pub struct Staging {
    /// Its pages, one behind the other.
    pages: Vec<Page>,
}

impl Staging {
    /// Bytes of a page.
    pub const PAGE_BYTES: usize = size_of::<Page>();

    /// A buffer for so many clusters, or for as many as are worth one write.
    pub fn for_clusters(clusters: u64) -> Self {
        let pages = usize::try_from(clusters.min(STAGING_PAGES)).unwrap_or(0);
        Self {
            pages: vec![Page::zeroed(); pages],
        }
    }

    /// A page; `None` beyond the end.
    pub fn page_mut(&mut self, page: usize) -> Option<&mut Page> {
        self.pages.get_mut(page)
    }

    /// Bytes of the buffer; `None` beyond the end.
    pub fn bytes(&self, start: usize, len: usize) -> Option<&[u8]> {
        let bytes = self.pages.len() * Self::PAGE_BYTES;
        #[expect(
            unsafe_code,
            reason = "pages behind each other are bytes behind each other"
        )]
        // SAFETY: a page is an array of 4096 bytes with no padding, and pages of a vector lie behind each other.
        let all = unsafe { std::slice::from_raw_parts(self.pages.as_ptr().cast::<u8>(), bytes) };
        all.get(start..start.checked_add(len)?)
    }
}
